"""What the trials came to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Counts:
    """Of some trials of one kind, or of all."""

    trials: int = 0
    survived: int = 0
    """The answer (or the batch) came to its end."""
    wrong: int = 0
    """Answers with a token, or lines with a text, other than the undisturbed one's; lost and
    doubled ones are among them."""
    orphans: int = 0
    """Processes that outlived their engine."""
    seconds: list[float] = field(default_factory=list)
    """From each fault until the next token that came after it had been noticed."""

    def add(self, *, survived: bool, wrong: int, seconds: float | None) -> None:
        """Count a trial."""
        self.trials += 1
        self.survived += survived
        self.wrong += wrong
        if seconds is not None:
            self.seconds.append(seconds)

    def merge(self, other: Counts) -> None:
        """Count the trials of another kind too."""
        self.trials += other.trials
        self.survived += other.survived
        self.wrong += other.wrong
        self.orphans += other.orphans
        self.seconds += other.seconds

    def line(self) -> dict[str, Any]:
        """For programs."""
        return {
            "trials": self.trials,
            "survived": self.survived,
            "wrong": self.wrong,
            "orphans": self.orphans,
            "recovery_p50_s": percentile(self.seconds, 50),
            "recovery_p99_s": percentile(self.seconds, 99),
        }

    def text(self, kind: str) -> str:
        """For people."""
        p50, p99 = percentile(self.seconds, 50), percentile(self.seconds, 99)
        times = "n/a" if p50 is None else f"p50 {p50:.2f} s, p99 {p99:.2f} s"
        return (
            f"{kind}: {self.trials} trials, {self.survived} survived, {self.wrong} wrong answers, "
            f"{self.orphans} orphans, recovery {times}"
        )


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that so many percent do not exceed; None of none."""
    if not values:
        return None
    rank = max(1, math.ceil(percent / 100 * len(values)))
    return round(sorted(values)[rank - 1], 3)
