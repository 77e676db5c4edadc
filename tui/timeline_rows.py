"""A stage's timeline as cells: which micro-batch it computed in each, or that it had none."""

from __future__ import annotations

from dataclasses import dataclass

from engine.protocol import FlightSpan
from engine.timeline import Window

BUBBLE = "·"
COVERED = 0.5
"""A cell shows a micro-batch that takes at least so much of its time."""


@dataclass(frozen=True)
class Cell:
    """A moment of one stage."""

    text: str = BUBBLE
    point: int | None = None
    """Of the outline, 0 for other sequences; None in a bubble."""
    odd: bool = False
    """Neighbouring micro-batches differ in it."""
    decode: bool = False


def cells(window: Window, stage: int, width: int) -> list[Cell]:
    """`width` cells from the window's beginning to its end.

    A micro-batch of several points shows one after the other.
    """
    seconds = window.seconds / width
    row = [Cell()] * width
    covered = [0.0] * width
    for span in window.stages[stage]:
        shown = sorted(set(span.points)) or [0]
        first = max(0, int((span.began - window.began) / seconds))
        last = min(width - 1, int((span.ended - window.began) / seconds))
        drawn = 0
        for at in range(first, last + 1):
            part = _overlap(span, window.began + at * seconds, seconds) / seconds
            if part >= COVERED and part > covered[at]:
                covered[at] = part
                row[at] = _cell(span, shown[drawn % len(shown)])
                drawn += 1
    return row


def _cell(span: FlightSpan, point: int) -> Cell:
    text = f"{point % 10}" if point else "█" if span.decode else "▒"
    return Cell(text, point, span.number % 2 == 1, span.decode)


def _overlap(span: FlightSpan, began: float, seconds: float) -> float:
    return max(0.0, min(span.ended, began + seconds) - max(span.began, began))
