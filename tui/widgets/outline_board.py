"""An outline answer while it grows: a card for each point, all of them filling in side by side."""

from __future__ import annotations

import textwrap

from rich.cells import set_cell_size
from textual.app import ComposeResult
from textual.containers import Grid
from textual.content import Content
from textual.widgets import Static

from tui.outline import Point
from tui.text import harmless
from tui.themes import DIM

TWO_COLUMNS, THREE_COLUMNS = 88, 132
"""From so many columns on, cards stand side by side; below they are stacked, without borders."""
CARD_LINES = 3


class PointCard(Static):
    """One point: its title, how far it is, and the end of its text."""

    DEFAULT_CSS = """
    PointCard {
        height: 5;
        padding: 0 1;
        border: round $foreground 25%;
        border-title-color: $text;
        border-subtitle-color: $foreground 60%;
        &.-growing { border: round $primary 60%; }
        &.-done { border: round $success 40%; }
    }
    """

    def show(self, point: Point, *, stacked: bool) -> None:
        """Show the point as it is now."""
        self.set_class(point.growing, "-growing")
        self.set_class(point.done, "-done")
        title, state = harmless(point.title), _state(point)
        width = max(10, self.content_size.width)
        if stacked:
            style = "$text-success" if point.done else "$text-primary" if point.growing else DIM
            room = max(1, width - len(state) - 1)
            lines: list[Content] = [
                Content.assemble((set_cell_size(title, room), "bold"), " ", (state, style)),
                *_end_of(point.text, width, 1),
            ]
        else:
            self.border_title, self.border_subtitle = Content(title), Content(state)
            lines = _end_of(point.text, width, CARD_LINES)
        self.update(Content("\n").join(lines))


def _state(point: Point) -> str:
    mark = "✓" if point.done else "…" if point.growing else "waits"
    return f"{mark} {point.tokens} tokens" if point.text else mark


def _end_of(text: str, width: int, lines: int) -> list[Content]:
    wrapped = [
        part for line in harmless(text).strip().splitlines() for part in textwrap.wrap(line, width)
    ]
    return [Content(line) for line in wrapped[-lines:]]


class OutlineBoard(Grid):
    """The cards of all points, as many beside each other as there is room for."""

    DEFAULT_CSS = """
    OutlineBoard {
        height: auto;
        grid-gutter: 0 1;
        grid-rows: 5;
        margin: 0 0 1 0;
        &.-stacked { grid-rows: 2; }
        &.-stacked PointCard, &.-stacked PointCard.-growing, &.-stacked PointCard.-done {
            height: 2;
            padding: 0 2;
            border: none;
        }
    }
    """

    def __init__(self) -> None:
        super().__init__()
        self._points: tuple[Point, ...] = ()

    def compose(self) -> ComposeResult:
        """A card for each point that is known."""
        yield from (PointCard() for _ in self._points)

    def on_resize(self) -> None:
        """As many columns as fit."""
        self._draw()

    async def show(self, points: tuple[Point, ...]) -> None:
        """Show these points; there may be more of them than before, never fewer."""
        new = [PointCard() for _ in points[len(self._points) :]]
        self._points = points
        if new and self.is_mounted:
            await self.mount(*new)
        self._draw()

    def _draw(self) -> None:
        width = self.size.width
        columns = 1 + (width >= TWO_COLUMNS) + (width >= THREE_COLUMNS)
        self.styles.grid_size_columns = columns
        self.set_class(columns == 1, "-stacked")
        for card, point in zip(self.query(PointCard), self._points, strict=False):
            card.show(point, stacked=columns == 1)
