"""Notices stages that are still there and do nothing any more, from what they say of themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.protocol import StageTelemetry

CHECK_S = 0.25
"""How often to look."""
SILENCE_S = 2.0
"""Telemetry comes twice a second from a thread of its own, whatever the stage works on."""
SLEPT_S = 1.0
"""A check that comes so late tells that it was the client that stood still."""
AT_WORK = ("busy", "wait", "link")


@dataclass(frozen=True)
class Hang:
    """What stands still."""

    rank: int | None
    """None where it is no stage but what is between them."""
    cause: str


class Watchdog:
    """Looks after stages that are ready; what they do before are declared states of their own.

    Args:
        world_size: number of stages.
        clock: monotonic seconds.
    """

    def __init__(self, world_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._world = world_size
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """All stages count as heard just now."""
        now = self._clock()
        self._checked = now
        self._heard = dict.fromkeys(range(self._world), now)
        self._last: dict[int, StageTelemetry] = {}
        self._before: dict[int, int] = {}
        self._moved = now

    def heard(self, rank: int, telemetry: StageTelemetry | None) -> None:
        """A stage has said something, perhaps about its work."""
        now = self._clock()
        self._heard[rank] = now
        if telemetry is None:
            return
        self._last[rank] = telemetry
        if telemetry.progress != self._before.get(rank):
            self._before[rank] = telemetry.progress
            self._moved = now

    def check(self) -> Hang | None:
        """What stands still, if anything; to be called every CHECK_S seconds."""
        now = self._clock()
        slept = now - self._checked > SLEPT_S
        self._checked = now
        if slept:
            self.restart()
            return None
        return self._silent(now) or self._stuck(now)

    def _silent(self, now: float) -> Hang | None:
        rank = min(self._heard, key=lambda rank: self._heard[rank])
        seconds = now - self._heard[rank]
        if seconds < SILENCE_S:
            return None
        return Hang(rank, f"rank {rank} has said nothing for {seconds:.1f} s")

    def _stuck(self, now: float) -> Hang | None:
        """Rank 0 knows of work, and no stage gets on with it."""
        first = self._last.get(0)
        if first is None or first.doing not in AT_WORK:
            self._moved = now
            return None
        seconds = now - self._moved
        if seconds < max(each.patience_s for each in self._last.values()):
            return None
        busy = [rank for rank, each in self._last.items() if each.doing == "busy"]
        if busy:
            return Hang(busy[-1], f"rank {busy[-1]} made no progress for {seconds:.1f} s")
        return Hang(None, f"nothing has passed between the stages for {seconds:.1f} s")
