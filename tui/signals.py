"""Ending a run without a screen on SIGINT, SIGTERM and SIGHUP: in order at first, at once then."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator

from engine.client import EngineClient
from tui.progress import Reporter


@contextlib.contextmanager
def ended_by_signals(
    work: asyncio.Task[None], client: EngineClient, reporter: Reporter
) -> Iterator[list[int]]:
    """Cancel `work` on the first signal, end the process at once on the second.

    Yields the list that the first signal is put into. SIGHUP counts unless `nohup` has set it to
    be ignored.
    """
    caught: list[int] = []

    def end(number: int) -> None:
        if caught:
            reporter.close()
            client.kill_now()
            os._exit(128 + number)
        caught.append(number)
        reporter.note("stopping (again to stop at once)")
        work.cancel()

    loop = asyncio.get_running_loop()
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signals.append(signal.SIGHUP)
    for number in signals:
        loop.add_signal_handler(number, end, int(number))
    try:
        yield caught
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
