"""Line charts in braille: each character cell is a grid of two by four dots. Free of Textual."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Format = Callable[[float], str]
Run = tuple[str, str]
"""A piece of text and its style."""
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800
AXIS = "$foreground 40%"
HEADROOM = 0.05
"""Share of the range that stays free above the highest point."""


@dataclass(frozen=True)
class Series:
    """A line of points (x, y), x rising; points that are not finite are left out."""

    label: str
    style: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bounds:
    """What the plot's edges stand for."""

    left: float
    right: float
    bottom: float
    top: float


def draw(
    series: Sequence[Series], width: int, height: int, y_format: Format, *, from_zero: bool = False
) -> list[list[Run]]:
    """The chart as `height` lines of at most `width` cells: plot, y labels, and x labels below.

    Args:
        from_zero: the y axis begins at 0, so that heights can be compared.

    Returns no lines where there is nothing to show or no room to show it in.
    """
    shown = [Series(s.label, s.style, finite(s.points, 4 * max(width, 1))) for s in series]
    shown = [s for s in shown if s.points]
    if not shown or height < 2 or width < 8:
        return []
    plain = _bounds(shown)
    rows = height - 1
    bottom, top = widened(min(0.0, plain.bottom) if from_zero else plain.bottom, plain.top)
    top += (top - bottom) * HEADROOM
    bounds = Bounds(plain.left, plain.right, bottom, top)
    marks = ticks(bottom, top, max(2, min(5, rows // 2)))
    labels = {_row(value, bounds, rows): y_format(value) for value in marks}
    gutter = max(map(len, labels.values()))
    columns = width - gutter - 1
    if columns < 4:
        return []
    canvas = _Canvas(columns, rows)
    for each in shown:
        canvas.line(each, bounds)
    lines: list[list[Run]] = []
    for row in range(rows):
        edge = "┤" if row in labels else "│"
        lines.append([(f"{labels.get(row, ''):>{gutter}}{edge}", AXIS), *canvas.row(row)])
    first, last = f"{bounds.left:.0f}", f"{bounds.right:.0f}"
    gap = columns - len(first) - len(last)
    below = first + " " * gap + last if gap > 0 and first != last else f"{last:>{columns}}"
    return [*lines, [(" " * (gutter + 1), ""), (below, AXIS)]]


def finite(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """The points that can be drawn; evenly chosen, the last one included, where there are more."""
    stride = max(1, len(points) // most)
    chosen = points if stride == 1 else [*points[: len(points) - 1 : stride], points[-1]]
    return [(x, y) for x, y in chosen if math.isfinite(x) and math.isfinite(y)]


def widened(low: float, high: float) -> tuple[float, float]:
    """The range of values to draw: never empty, for a line that is flat has to be seen, too."""
    if high > low:
        return low, high
    pad = abs(low) * 0.05 or 1.0
    return low - pad, high + pad


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round values, evenly apart, within a range that is not empty; at least one."""
    scale = 10.0 ** math.floor(math.log10((high - low) / max(1, most)))
    for step in (m * scale for m in (1.0, 2.0, 2.5, 5.0, 10.0, 20.0, 50.0)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if 0 < last - first + 1 <= most:
            return [n * step for n in range(first, last + 1)]
    return [high]


def _bounds(series: Sequence[Series]) -> Bounds:
    xs = [x for each in series for x, _ in each.points]
    ys = [y for each in series for _, y in each.points]
    return Bounds(min(xs), max(xs), min(ys), max(ys))


def _row(value: float, bounds: Bounds, rows: int) -> int:
    return _dot_y(value, bounds, rows) // 4


def _dot_y(value: float, bounds: Bounds, rows: int) -> int:
    share = (value - bounds.bottom) / (bounds.top - bounds.bottom)
    return round((1 - share) * (rows * 4 - 1))


class _Canvas:
    """Dots, and the style of whoever drew in a cell last."""

    def __init__(self, columns: int, rows: int) -> None:
        self._columns, self._rows = columns, rows
        self._dots = [[0] * columns for _ in range(rows)]
        self._styles = [[""] * columns for _ in range(rows)]

    def line(self, series: Series, bounds: Bounds) -> None:
        """Draw the points, each joined to the next."""
        span = bounds.right - bounds.left
        before: tuple[int, int] | None = None
        for x, y in series.points:
            share = (x - bounds.left) / span if span else 1.0
            at = round(share * (self._columns * 2 - 1)), _dot_y(y, bounds, self._rows)
            self._join(before or at, at, series.style)
            before = at

    def _join(self, a: tuple[int, int], b: tuple[int, int], style: str) -> None:
        steps = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
        for n in range(steps + 1):
            x = round(a[0] + (b[0] - a[0]) * n / steps)
            y = round(a[1] + (b[1] - a[1]) * n / steps)
            self._dots[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
            self._styles[y // 4][x // 2] = style

    def row(self, row: int) -> list[Run]:
        """One line of cells, neighbours of one style together."""
        runs: list[Run] = []
        for dots, style in zip(self._dots[row], self._styles[row], strict=True):
            text = chr(_BLANK + dots) if dots else " "
            if runs and (runs[-1][1] == style or not dots):
                runs[-1] = (runs[-1][0] + text, runs[-1][1])
            else:
                runs.append((text, style))
        return runs
