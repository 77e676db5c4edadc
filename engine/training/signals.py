"""Ctrl+C and SIGTERM: remembered, so that a run can end between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from engine.errors import ExitCode

EXIT_CODES = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}


class StopSignals:
    """While entered, these signals end the process with their exit code.

    Where `deferred` is set, the first one is only remembered in `received`.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in EXIT_CODES}
        return self

    def __exit__(self, *exception: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None or not self.deferred:
            raise SystemExit(int(EXIT_CODES[signal.Signals(number)]))
        self.received = signal.Signals(number)
