"""When each stage computed which micro-batch, and what of the time was a bubble. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.protocol import FlightSpan

KEPT = 4096
"""Micro-batches of each stage that are kept."""


@dataclass(frozen=True)
class Window:
    """What the stages did between two moments, in seconds since 1970."""

    began: float
    ended: float
    stages: tuple[tuple[FlightSpan, ...], ...]
    """Of each stage the spans that reach into it, oldest first."""

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.ended - self.began

    def busy(self, stage: int) -> float | None:
        """Share of the time in which a stage computed; None where the window is empty."""
        if self.seconds <= 0:
            return None
        spans = self.stages[stage]
        return sum(self._inside(span.began, span.ended) for span in spans) / self.seconds

    def in_the_air(self) -> float | None:
        """Mean number of micro-batches between the first stage's beginning and the last's end."""
        if self.seconds <= 0 or not self.stages:
            return None
        ends = {span.number: span.ended for span in self.stages[-1]}
        first = self.stages[0]
        paths = [(span.began, ends[span.number]) for span in first if span.number in ends]
        return sum(self._inside(*path) for path in paths) / self.seconds

    def all_busy(self) -> float | None:
        """Share of the time in which all stages computed at once: none where they take turns."""
        if self.seconds <= 0 or not self.stages:
            return None
        # Spans of one stage do not overlap, so as many as there are stages are one of each.
        edges = sorted(
            edge
            for spans in self.stages
            for span in spans
            for edge in ((max(span.began, self.began), 1), (min(span.ended, self.ended), -1))
            if span.ended > self.began and span.began < self.ended
        )
        busy, since, total = 0, 0.0, 0.0
        for moment, change in edges:
            if busy == len(self.stages):
                total += moment - since
            busy, since = busy + change, moment
        return total / self.seconds

    def points_at_once(self) -> int:
        """The most points of an outline that were between the stages' two ends together."""
        if not self.stages:
            return 0
        ends = {span.number: span.ended for span in self.stages[-1]}
        first = [span for span in self.stages[0] if any(span.points) and span.number in ends]
        return max(
            (len(_points(o for o in first if o.began <= s.began < ends[o.number])) for s in first),
            default=0,
        )

    def _inside(self, began: float, ended: float) -> float:
        return max(0.0, min(ended, self.ended) - max(began, self.began))


def _points(spans: Iterable[FlightSpan]) -> set[int]:
    return {point for span in spans for point in span.points if point}


class Timeline:
    """The micro-batches of all stages of one launch, as far back as they are kept."""

    def __init__(self) -> None:
        self._stages: dict[int, dict[int, FlightSpan]] = {}

    def add(self, rank: int, spans: Sequence[FlightSpan]) -> None:
        """Take in what a stage tells; what is known already is told again."""
        known = self._stages.setdefault(rank, {})
        known.update((span.number, span) for span in spans)
        for number in list(known)[: len(known) - KEPT]:
            del known[number]

    def window(self, began: float, ended: float) -> Window:
        """What happened between two moments."""
        count = max(self._stages, default=-1) + 1
        return Window(
            began,
            ended,
            tuple(
                tuple(
                    span
                    for span in self._stages.get(rank, {}).values()
                    if span.began < ended and span.ended > began
                )
                for rank in range(count)
            ),
        )

    def latest(self, seconds: float, *, outline: bool = False) -> Window:
        """The last `seconds` in which something was computed, or that of an outline's points.

        It ends where all stages have told; an empty window where nothing was.
        """
        ends = [
            max((s.ended for s in spans.values() if any(s.points) or not outline), default=0.0)
            for spans in self._stages.values()
        ]
        ended = min(ends, default=0.0)
        return self.window(ended - seconds, ended) if ended else Window(0.0, 0.0, ())
