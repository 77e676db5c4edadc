"""A figure's recent past: title and value on the first line, the drawing and its scale below."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from textual.content import Content
from textual.widget import Widget

from tui.sparks import area, bars, nice_top
from tui.themes import DIM

AXIS = "$foreground 40%"
Label = str | Content


class History(Widget):
    """Draws what `show` was given last, as large as it is.

    Args:
        form: "area" for a curve over time, "bars" for one bar each.
        y_format: how a value is written at the axis.
        seconds: of time between two values, where there is such; for the labels below.
    """

    DEFAULT_CSS = """
    History {
        height: 1fr;
        width: 1fr;
        padding: 0 1;
    }
    """

    def __init__(
        self,
        form: str,
        y_format: Callable[[float], str],
        *,
        style: str = "$primary",
        seconds: float | None = None,
        id: str | None = None,
    ) -> None:
        super().__init__(id=id)
        self._draw = area if form == "area" else bars
        self._per_cell = 2.0 if form == "area" else 0.5
        self._format = y_format
        self._style = style
        self._seconds = seconds
        self._title: Label = ""
        self._values: Sequence[float | None] = ()

    def show(self, title: Label, values: Sequence[float | None]) -> None:
        """Draw these values, the newest last."""
        self._title, self._values = title, values
        self.refresh()

    def render(self) -> Content:
        """As many lines as there is room for."""
        width, height = self.content_size
        return Content("\n").join(self._lines(width, height))

    def _lines(self, width: int, height: int) -> list[Content]:
        title = self._title if isinstance(self._title, Content) else Content(self._title)
        head = title.truncate(width, ellipsis=True)
        if height < 3 or all(value is None for value in self._values):
            return [head, Content.styled("n/a", DIM)][:height]
        rows = height - 2
        rows -= rows > 4 and rows % 2 == 0  # an odd number has a line in the middle
        # The scale is that of what is shown, so that a peak of long ago flattens nothing.
        gutter = 6
        columns = max(1, width - gutter - 1)
        shown = self._values[-int(columns * self._per_cell) :]
        top = nice_top(shown)
        labels = {0: self._format(top), rows - 1: self._format(0.0)}
        if rows >= 5:
            labels[rows // 2] = self._format(top / 2)
        lines = [head]
        for row, text in enumerate(self._draw(shown, columns, rows, top)):
            mark = "┤" if row in labels else "│"
            lines.append(
                Content.assemble(
                    (f"{labels.get(row, ''):>{gutter}}{mark}", AXIS), (text, self._style)
                )
            )
        return [*lines, Content.styled(" " * (gutter + 1) + self._below(columns), AXIS)]

    def _below(self, columns: int) -> str:
        """What the left and the right edge stand for."""
        if self._seconds is None:
            return f"{'last':>{columns}}"
        first = f"-{columns * self._per_cell * self._seconds:.0f} s"
        return f"{first}{'now':>{max(0, columns - len(first))}}"
