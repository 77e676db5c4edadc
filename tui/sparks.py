"""Small drawings of figures over time, in characters: areas, bars, sparklines, stacked bars.

Free of Textual. The newest value is on the right; None is a gap, 0 is a line at the bottom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_LEVELS = " ▁▂▃▄▅▆▇█"
_BLANK = 0x2800
# The dots of a braille character's left and right column, from the bottom up.
_LEFT = (0x40, 0x04, 0x02, 0x01)
_RIGHT = (0x80, 0x20, 0x10, 0x08)


def nice_top(values: Sequence[float | None]) -> float:
    """A round number that is not below any of the values; 1 where all are 0 or unknown."""
    highest = max((value for value in values if value is not None), default=0.0)
    if highest <= 0:
        return 1.0
    scale = 10.0 ** math.floor(math.log10(highest))
    return next(m * scale for m in (1.0, 2.0, 5.0, 10.0) if m * scale >= highest)


def area(values: Sequence[float | None], width: int, height: int, top: float) -> list[str]:
    """A filled curve from 0 to `top`, in braille: two values a column, four steps a line."""
    dots = [None if v is None else _steps(v, top, 4 * height) for v in values[-2 * width :]]
    dots = [*[None] * (2 * width - len(dots)), *dots]
    return [
        "".join(
            chr(_BLANK + _column(dots[2 * x], _LEFT, row) + _column(dots[2 * x + 1], _RIGHT, row))
            for x in range(width)
        )
        for row in reversed(range(height))
    ]


def _column(dots: int | None, column: tuple[int, ...], row: int) -> int:
    """The dots of one value in the line that is `row` lines above the bottom."""
    return 0 if dots is None else sum(column[: max(0, min(4, dots - 4 * row))])


def _steps(value: float, top: float, steps: int) -> int:
    return max(1, min(steps, round(steps * value / top)))


def bars(values: Sequence[float | None], width: int, height: int, top: float) -> list[str]:
    """One bar for each value, a gap between neighbours, eight steps a line."""
    shown = list(values[-((width + 1) // 2) :]) if width > 0 else []
    eighths = [0 if v is None else _steps(v, top, 8 * height) for v in shown]
    lines = []
    for row in reversed(range(height)):
        cells = [_LEVELS[max(0, min(8, n - 8 * row))] for n in eighths]
        lines.append(" ".join(cells).rjust(width))
    return lines


def spark(values: Sequence[float | None], width: int, top: float = 1.0) -> str:
    """One line: a character for each value, eight steps high."""
    shown = values[-width:] if width > 0 else []
    return "".join(" " if v is None else _LEVELS[_steps(v, top, 8)] for v in shown).rjust(width)


def parts(shares: Sequence[float], width: int) -> list[int]:
    """Cells for each of several shares that are 1 together, `width` cells in all.

    Largest remainders first, so that rounding neither adds nor loses a cell.
    """
    exact = [share * width for share in shares]
    cells = [math.floor(value) for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda n: cells[n] - exact[n])
    for n in by_rest[: max(0, width - sum(cells))]:
        cells[n] += 1
    return cells
