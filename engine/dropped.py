"""Counting frames that could not be used, for both ends of the shared queue."""

from __future__ import annotations

import time

from engine.protocol import Notice

REPORT_EVERY_S = 1.0


class DropCount:
    """Counts dropped frames and words a notice about them, at most one a second.

    Args:
        what: the kind of frame in the notice, such as "command".
    """

    def __init__(self, what: str) -> None:
        self.count = 0
        self._what = what
        self._reported = 0
        self._next = 0.0

    def wait_ms(self) -> int | None:
        """Milliseconds until the next notice is due; None when there is nothing to tell."""
        if self.count == self._reported:
            return None
        return max(0, int((self._next - time.monotonic()) * 1000) + 1)

    def notice(self) -> Notice | None:
        """The notice that is due, if any."""
        new = self.count - self._reported
        if new == 0 or time.monotonic() < self._next:
            return None
        self._reported = self.count
        self._next = time.monotonic() + REPORT_EVERY_S
        return Notice(f"{new} malformed or stale {self._what} frames dropped, {self.count} in all")
