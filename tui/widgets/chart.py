"""A chart of lines with a title; live: give it newer series and it draws them."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content
from textual.widget import Widget

from tui.chart import Format, Series, draw
from tui.themes import DIM


class LineChart(Widget):
    """Title and latest value on the first line, the plot below it.

    Args:
        title: what is drawn, with its unit.
        y_format: how a value is written, at the axis and beside the title.
        from_zero: the axis begins at 0.
    """

    DEFAULT_CSS = """
    LineChart {
        height: 1fr;
        width: 1fr;
        min-height: 4;
        padding: 0 1;
        text-wrap: nowrap;
    }
    """

    def __init__(
        self, title: str, y_format: Format, *, from_zero: bool = True, id: str | None = None
    ) -> None:
        super().__init__(id=id)
        self._from_zero = from_zero
        self.title = title
        self._format = y_format
        self._series: Sequence[Series] = ()

    def show(self, series: Sequence[Series], title: str | None = None) -> None:
        """Draw these lines from now on."""
        self._series = series
        self.title = title or self.title
        self.refresh()

    def render(self) -> Content:
        """As many lines as there is room for."""
        width, height = self.content_size
        lines = [self._head(width)]
        plot = draw(self._series, width, height - 1, self._format, from_zero=self._from_zero)
        lines += [Content.assemble(*runs) for runs in plot]
        if not plot:
            lines.append(Content.styled("n/a", DIM))
        return Content("\n").join(lines)

    def _head(self, width: int) -> Content:
        title = Content.styled(self.title, "bold")
        known = [series for series in self._series if series.points]
        latest: list[tuple[str, str]] = []
        for series in known:
            label = f"{series.label} " if series.label else ""
            latest.append((f"  {label}{self._format(series.points[-1][1])}", series.style))
        right = Content.assemble(*latest)
        if title.cell_length + right.cell_length > width:
            # The values alone still tell the lines apart by their colours.
            latest = [(f" {self._format(s.points[-1][1])}", s.style) for s in known]
            right = Content.assemble(*latest)
        room = max(0, width - title.cell_length)
        return Content.assemble(title, right.truncate(room, ellipsis=True))
