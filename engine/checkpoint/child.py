"""Running a module in a process of its own. Torch-free."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

from engine.errors import CheckpointError
from engine.launch import module_environment

CONVERT = "engine.checkpoint.convert"
"""The module that may import transformers and torch, where the caller must not."""


def run_module(
    module: str, words: Sequence[str], on_line: Callable[[str], None], keep_open: Sequence[int] = ()
) -> None:
    """Run `python -m module words`; `on_line` gets each line of its stdout.

    Descriptors in `keep_open` are inherited.

    Raises:
        CheckpointError: it failed; the message is the line of its stderr that says most.
    """
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            # All that conversions read is local; transformers must not ask the hub about it.
            env={**os.environ, **module_environment(), "HF_HUB_OFFLINE": "1"},
            pass_fds=keep_open,
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                on_line(line.rstrip())
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        errors.seek(0)
        if code:
            raise CheckpointError(_reason(errors.read()))


def _reason(stderr: str) -> str:
    """The line of a program's error output that says most."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it gave no reason"])[-1].removeprefix("ERROR:").strip()
