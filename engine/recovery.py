"""When a lost stage is replaced, and when no longer."""

from __future__ import annotations

import time
from collections.abc import Callable

ATTEMPTS = 3
"""So often in a row, without anything being achieved in between."""
FIRST_DELAY_S = 0.5
STEADY_S = 60.0
"""An engine that was ready for so long has achieved something, if only to be ready."""


class Attempts:
    """Counts failures without progress; each is waited for twice as long as the one before.

    Args:
        limit: of them; 0 for none at all.
        clock: monotonic seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.made = 0
        """Since the last progress."""
        self._clock = clock
        self._up_since: float | None = None

    def progressed(self) -> None:
        """A token came."""
        self.made = 0

    def up(self) -> None:
        """The engine is ready."""
        self._up_since = self._clock()

    def next_delay(self) -> float | None:
        """Something failed: seconds until another attempt, None when there shall be none."""
        if self._up_since is not None and self._clock() - self._up_since >= STEADY_S:
            self.made = 0
        self._up_since = None
        if self.made >= self.limit:
            return None
        self.made += 1
        # The first at once: one that died had a reason of its own as a rule.
        return 0.0 if self.made == 1 else FIRST_DELAY_S * 2 ** (self.made - 2)
