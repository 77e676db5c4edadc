"""Who was there, and who is still there when nobody should be."""

from __future__ import annotations

from contextlib import suppress

import psutil

from engine.processes import ProcessHandle, wait_all_gone

PATIENCE_S = 5.0


class Witness:
    """Remembers every process below this one."""

    def __init__(self) -> None:
        self._seen: dict[int, ProcessHandle] = {}

    def look(self, pid: int | None = None) -> None:
        """Remember those that are there now, below this process or `pid`."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(pid).children(recursive=True):
                if child.pid not in self._seen or self._seen[child.pid].gone():
                    with suppress(OSError):
                        self._seen[child.pid] = ProcessHandle(child.pid)

    def left(self) -> int:
        """How many of them have not ended, a little after the end of all; they are forgotten."""
        wait_all_gone(self._seen.values(), PATIENCE_S)
        left = sum(not handle.gone() for handle in self._seen.values())
        for handle in self._seen.values():
            handle.close()
        self._seen.clear()
        return left
