"""The draft against the live split, a line for each figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.content import Content
from textual.widgets import Static

from tui.stage_view import Compared
from tui.themes import DIM
from tui.widgets.draft_card import STYLES

COLUMN = 12


class Comparison(Static):
    """A small table: label, live, draft, change."""

    DEFAULT_CSS: ClassVar[str] = """
    Comparison { height: auto; padding: 0 2; }
    """

    def show(self, lines: Sequence[Compared], *, note: str) -> None:
        """Draw the lines; `note` stands in the heading's last column."""
        self.update(table(lines, note))


def table(lines: Sequence[Compared], note: str) -> Content:
    """The lines with aligned columns under a heading."""
    width = max(len(line.label) for line in lines) + 2
    head = f"{'':<{width}}{'live':>{COLUMN}}{'draft':>{COLUMN}}   {note}"
    rows = [Content.styled(head, DIM)]
    rows += [
        Content.assemble(
            (f"{line.label:<{width}}", DIM),
            f"{line.live:>{COLUMN}}{line.draft:>{COLUMN}}   ",
            (line.change, STYLES[line.tone]),
        )
        for line in lines
    ]
    return Content("\n").join(rows)
