"""What a decode step costs by its rows: measured seconds, and what lies between them."""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Row counts that a cost is kept of; others lie between two of them."""
GUESS_ROWS = 16.0
"""Before anything is measured, so many rows are taken to cost twice as much as none."""
TRUST = 0.4
"""Of what a single step costs more or less than it should, so much is believed."""
PACE_TRUST = 0.125
HELD_UP = 1.5
"""A step that took so many times longer than it should was held up: it counts as one of that."""


class StepCost:
    """The cost curve of this pipeline, relative, and the present pace.

    A machine that is busy with something else, or a longer context, slows all steps alike; what a
    choice between trees rests on is only how they compare. So steps of the tree in use set the
    pace, and now and then a step of another size is compared with them.
    """

    def __init__(self) -> None:
        self._cost = [1.0 + rows / GUESS_ROWS for rows in ROWS]
        self._draft = 0.0
        self._pace: float | None = None

    def calibrate(self, measured: dict[int, float], *, undrafted: float) -> None:
        """Begin from steps measured one by one; what cannot be a duration is left out.

        Args:
            measured: seconds of steps that ended with drafting by all heads, by their rows.
            undrafted: seconds of a step of one row without.
        """
        known = sorted((rows, s) for rows, s in measured.items() if _is_duration(s))
        if len(known) < 2:  # how sizes compare cannot be told: the guess stays
            for rows, s in known:
                self.learn(rows, s, drafting=1.0)
            return
        # A larger step is no cheaper: one that seems to be tells that the smaller was held up.
        least = [*accumulate((s for _, s in reversed(known)), min)][::-1]
        if known[0][0] == 1 and _is_duration(undrafted):
            self._draft = max(0.0, least[0] - undrafted)
        curve = [(rows, s - self._draft) for (rows, _), s in zip(known, least, strict=True)]
        self._cost = [_between(curve, rows) for rows in ROWS]
        self._pace = 1.0

    @property
    def measured(self) -> bool:
        """Whether `seconds` are seconds by now."""
        return self._pace is not None

    def seconds(self, rows: int, *, drafting: float) -> float:
        """A step of so many rows, at the present pace; relative only before the first step.

        drafting: its drafting, as a part of that with all heads; 0 for none.
        """
        return (self._pace or 1.0) * self._relative(rows, drafting)

    def learn(self, rows: int, seconds: float, *, drafting: float) -> None:
        """A step of the tree in use took so long."""
        if not _is_duration(seconds):
            return
        pace = seconds / self._relative(rows, drafting)
        if self._pace is None:
            self._pace = pace
        else:
            pace = min(pace, HELD_UP * self._pace)
            self._pace += PACE_TRUST * (pace - self._pace)

    def compare(self, rows: int, seconds: float, *, drafting: float) -> None:
        """A step with other rows than those in use took so long."""
        error = self._error(rows, seconds, drafting)
        for at, share in _places(rows):
            # Whatever the clock says, a step does not cost nothing.
            self._cost[at] = max(0.5 * self._cost[at], self._cost[at] + share * error)

    def compare_drafting(self, rows: int, seconds: float, *, drafting: float) -> None:
        """A step as in use, but that it drafted and those in use do not, took so long."""
        error = self._error(rows, seconds, drafting)
        self._draft = max(0.0, self._draft + error / drafting)

    def _error(self, rows: int, seconds: float, drafting: float) -> float:
        """What a single step tells of the relative cost: how much it is to be raised."""
        if self._pace is None or not _is_duration(seconds):
            return 0.0
        expected = self._relative(rows, drafting)
        return TRUST * (min(seconds / self._pace, HELD_UP * expected) - expected)

    def _relative(self, rows: int, drafting: float) -> float:
        return sum(share * self._cost[at] for at, share in _places(rows)) + drafting * self._draft


def _is_duration(seconds: float) -> bool:
    """Not of a clock that stood still, and no NaN."""
    return 0.0 < seconds < math.inf


def _places(rows: int) -> list[tuple[int, float]]:
    """The kept row counts around `rows`, each with its share; beyond the last, in proportion."""
    if rows >= ROWS[-1]:
        return [(len(ROWS) - 1, rows / ROWS[-1])]
    at = bisect_left(ROWS, rows)
    if ROWS[at] == rows:
        return [(at, 1.0)]
    right = (rows - ROWS[at - 1]) / (ROWS[at] - ROWS[at - 1])
    return [(at - 1, 1.0 - right), (at, right)]


def _between(known: list[tuple[int, float]], rows: int) -> float:
    """Linear between the known points, level before the first, the last slope behind the last."""
    if rows <= known[0][0] or len(known) == 1:
        return known[0][1]
    at = next((i for i, point in enumerate(known) if point[0] >= rows), len(known) - 1)
    (left, low), (right, high) = known[at - 1], known[at]
    slope = (high - low) / (right - left)
    return low + (slope if rows <= right else max(0.0, slope)) * (rows - left)
