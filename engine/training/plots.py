"""Line plots of a run as SVG, drawn from logging.jsonl's numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 40, 45
# Okabe and Ito's palette, which tells curves apart for the colour-blind too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def write_plot(path: Path, title: str, curves: Mapping[str, Points]) -> None:
    """Draw `curves` over the steps of the run; points that are no numbers are left out."""
    shown = {
        name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in curves.items()
    }
    shown = {name: points for name, points in shown.items() if points}
    everything = [point for points in shown.values() for point in points] or [(0.0, 0.0)]
    xs = _axis([x for x, _ in everything])
    ys = _axis([y for _, y in everything])
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>',
    ]
    parts += _grid(xs, ys)
    for index, (name, points) in enumerate(shown.items()):
        parts += _curve(name, [(_x(x, xs), _y(y, ys)) for x, y in points], index)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def _axis(values: Sequence[float]) -> list[float]:
    """About five round numbers that span `values`."""
    low, high = min(values), max(values)
    raw = (high - low) / 4 or abs(high) / 4 or 1.0
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first = math.floor(low / step)
    count = max(1, math.ceil(high / step - first - 1e-9))
    return [(first + index) * step for index in range(count + 1)]


def _x(value: float, ticks: list[float]) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (value - ticks[0]) / (ticks[-1] - ticks[0])


def _y(value: float, ticks: list[float]) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - ticks[0]) / (ticks[-1] - ticks[0])


def _grid(xs: list[float], ys: list[float]) -> list[str]:
    parts = []
    for tick in xs:
        x = _x(tick, xs)
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in ys:
        y = _y(tick, ys)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    return parts


def _curve(name: str, places: Points, index: int) -> list[str]:
    colour = COLOURS[index % len(COLOURS)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    y = TOP + 12 + 18 * index
    at = WIDTH - RIGHT + 12
    across = f'x1="{at}" x2="{at + 16}" y1="{y - 4}" y2="{y - 4}"'
    parts = [
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
        f'<line {across} stroke="{colour}" stroke-width="3"/>',
        f'<text x="{at + 22}" y="{y}">{escape(name)}</text>',
    ]
    if len(places) == 1:  # no line to see
        ((px, py),) = places
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2" fill="{colour}"/>')
    return parts
