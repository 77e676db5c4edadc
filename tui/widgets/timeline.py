"""The stages' timeline: which micro-batch each computed when, and where it had none."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from engine.timeline import Window
from tui import metrics
from tui.themes import DIM
from tui.timeline_rows import Cell, cells

COLOURS = ("$primary", "$success", "$warning", "$secondary", "$error", "$accent")
"""Of an outline's points, in turns."""
GUTTER = 10
NOTHING = "nothing was computed yet"
KEY = "1 2 3 points of an outline   █ other decode steps   ▒ prompt tokens   · bubble"


class TimelineView(Widget):
    """Draws the window that `show` was given last, a line for each stage."""

    DEFAULT_CSS = """
    TimelineView { height: 1fr; width: 1fr; padding: 0 1; }
    """

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._window = Window(0.0, 0.0, ())

    def show(self, window: Window) -> None:
        """Draw this window."""
        self._window = window
        self.refresh()

    def render(self) -> Content:
        """As many lines as there is room for."""
        width, height = self.content_size
        return Content("\n").join(self._lines(width, height)[:height])

    def _lines(self, width: int, height: int) -> list[Content]:
        window = self._window
        columns = width - GUTTER - 6
        if not window.seconds or columns < 10:
            return [Content.styled("timeline", "bold"), Content.styled(NOTHING, DIM)]
        lines = [self._head().truncate(width, ellipsis=True)]
        gap = [Content("")] if height >= 2 * len(window.stages) + 3 else []
        for stage in range(len(window.stages)):
            parts = [_drawn(cell) for cell in cells(window, stage, columns)]
            share = window.busy(stage)
            busy = metrics.UNKNOWN if share is None else f"{share:.0%}"
            label = (f"{f'stage {stage}':<{GUTTER - 1}}│", DIM)
            lines += [*gap, Content.assemble(label, *parts, (f"{busy:>6}", DIM))]
        ends = f"-{window.seconds:g} s"
        axis = " " * (GUTTER - 1) + f"└{ends}{'now':>{max(0, columns - len(ends))}}"
        return [*lines, Content.styled(axis, DIM), Content.styled(KEY, DIM)]

    def _head(self) -> Content:
        window = self._window
        air = window.in_the_air()
        points = window.points_at_once()
        return Content.assemble(
            ("timeline  ", "bold"),
            (f"{metrics.UNKNOWN if air is None else f'{air:.1f}'} micro-batches", "$text-primary"),
            " in the air",
            (f" · up to {points} points at once" if points else "", "$text-secondary"),
            (f" · {window.seconds:g} s, + and - zoom", DIM),
        )


def _drawn(cell: Cell) -> tuple[str, str]:
    if cell.point is None:
        return cell.text, DIM
    if not cell.point:
        return cell.text, "$foreground" if cell.odd else "$foreground 60%"
    colour = COLOURS[(cell.point - 1) % len(COLOURS)]
    shade = "" if cell.odd else " 70%"
    return cell.text, f"$background on {colour}{shade}" if cell.decode else f"{colour} reverse"
