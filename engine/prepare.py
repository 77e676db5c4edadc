"""Before a launch: the model's files are here and fit the config."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

from engine.config import JupiterConfig
from engine.errors import CheckpointError, EngineError, ExitCode
from engine.launch import module_environment
from engine.logs import describe_exit

FETCH = ("engine.cli.main", "fetch")
CHUNK = 4096
MAX_LINE = 10_000


async def prepare_model(config: JupiterConfig, on_message: Callable[[str], None]) -> Path:
    """The base model's folder, fetched first where needed, checked against `config`.

    `on_message` gets the progress of a fetch, a line for people at a time.

    Raises:
        CheckpointError, ConfigError: one line that names what does not fit.
        EngineError: the fetch was ended from outside.
    """
    # Only needed here: the client paints its first screen before these are imported.
    from engine.checkpoint.preflight import preflight
    from engine.checkpoint.sources import resolve_cached

    async def located(source: str) -> Path:
        folder = await asyncio.to_thread(resolve_cached, source)
        return folder or await fetch(source, on_message)

    folder = await located(config.base_model_name_or_path)
    if config.medusa_head_path is not None:
        await located(config.medusa_head_path)
    await asyncio.to_thread(preflight, config, folder)
    return folder


async def fetch(source: str, on_message: Callable[[str], None]) -> Path:
    """Run `jupiter fetch` in a process that ends with this one, or when this is cancelled.

    Raises as `prepare_model`.
    """
    on_message(f"fetching {source}")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "engine.owned", str(os.getpid()), *FETCH, source),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        start_new_session=True,  # its helpers are ended with it, as one group
        env={**os.environ, **module_environment()},
    )
    assert process.stdout is not None and process.stderr is not None
    output = asyncio.ensure_future(process.stdout.read())
    last = "it gave no reason"
    try:
        async for line in _lines(process.stderr):
            last = line
            on_message(line)
        folder = (await output).decode().strip().splitlines()[-1:]
        code = await process.wait()
    finally:
        output.cancel()
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if code == ExitCode.BAD_INPUT:
        raise CheckpointError(last.removeprefix("jupiter fetch: "))
    if code != 0 or not folder:
        raise EngineError(f"{source}: the fetch {describe_exit(code)}: {last}")
    return Path(folder[0])


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """The lines of a program's output; a carriage return ends one too, as progress bars use it."""
    rest = ""
    while chunk := await stream.read(CHUNK):
        *lines, rest = re.split(r"[\r\n]+", rest + chunk.decode("utf-8", "replace"))
        rest = rest[-MAX_LINE:]
        for line in filter(None, map(str.strip, lines)):
            yield line
    if rest.strip():
        yield rest.strip()
