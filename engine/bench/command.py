"""What the benches have in common as commands."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from engine.errors import ExitCode


def positive(text: str) -> int:
    """An option's whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def say(line: str) -> None:
    """Tell a person what goes on; the figures have standard output for themselves."""
    print(line, file=sys.stderr, flush=True)


def run_to_end(work: Coroutine[Any, Any, None]) -> int:
    """Run to the end or until a signal, and let `work` clean up; returns the exit code."""
    caught: list[int] = []

    async def guarded() -> None:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()

        def end(number: int) -> None:
            caught.append(number)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end, int(number))
        await task

    try:
        asyncio.run(guarded())
    except asyncio.CancelledError:
        return 128 + caught[0]
    return ExitCode.OK
