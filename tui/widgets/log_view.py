"""Lines of a log: scrolled, searched, selected; it stays at the end while it follows."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual.geometry import Size
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip

MAX_LINES = 100_000
"""Older lines are let go."""


class LogView(ScrollView, can_focus=True):
    """Plain lines; a long one is scrolled sideways."""

    ALLOW_SELECT = True
    COMPONENT_CLASSES: ClassVar[set[str]] = {"log-view--match", "log-view--current"}
    DEFAULT_CSS = """
    LogView {
        background: $background;
        overflow: scroll;
        scrollbar-size-vertical: 1;
        scrollbar-size-horizontal: 1;

        & > .log-view--match { background: $warning 30%; text-style: underline; }
        & > .log-view--current { text-style: reverse bold; }
    }
    """

    following: reactive[bool] = reactive(True)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.lines: list[str] = []
        self.found: list[int] = []
        """Numbers of the lines that have what is searched for."""
        self.current: int | None = None
        """The line of the match that was gone to last."""
        self._partial = False
        self._width = 0
        self._pattern: re.Pattern[str] | None = None
        self._growing = False

    # --- what is shown ---------------------------------------------------------------------

    def clear(self) -> None:
        """Forget all lines."""
        self.lines.clear()
        self.found.clear()
        self.current, self._partial, self._width = None, False, 0
        self._resized()

    def add(self, lines: Sequence[str], partial: str = "") -> None:
        """Add whole lines, and below them the one that is being written."""
        if self._partial:
            self._drop_last()
        new = [*lines, partial] if partial else list(lines)
        self._partial = bool(partial)
        if self._pattern is not None:
            first = len(self.lines)
            self.found += [first + n for n, line in enumerate(new) if self._pattern.search(line)]
        self.lines += new
        self._width = max([self._width, *map(cell_len, new)])
        if (extra := len(self.lines) - MAX_LINES) > 0:
            self._trim(extra)
        self._resized()

    def _drop_last(self) -> None:
        self.lines.pop()
        if self.found and self.found[-1] == len(self.lines):
            self.found.pop()

    def _trim(self, count: int) -> None:
        del self.lines[:count]
        self.found = [n - count for n in self.found if n >= count]
        if self.current is not None:
            self.current = self.current - count if self.current >= count else None

    def _resized(self) -> None:
        self._growing = True
        try:
            self.virtual_size = Size(self._width, len(self.lines))
            self._hold_end()
        finally:
            self._growing = False
        self.refresh()

    def _hold_end(self) -> None:
        if self.following:
            self.scroll_end(animate=False, immediate=True, x_axis=False)

    def on_resize(self) -> None:
        """The end stays in view."""
        self._hold_end()

    def watch_following(self) -> None:
        """Go to the end."""
        self._hold_end()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Scrolling up lets go of the end, scrolling down to it takes hold again."""
        super().watch_scroll_y(old_value, new_value)
        if not self._growing and round(old_value) != round(new_value):
            self.following = new_value >= self.max_scroll_y

    # --- search ----------------------------------------------------------------------------

    def search(self, words: str) -> None:
        """Mark `words`; a capital letter among them makes case count. Empty marks nothing."""
        flags = re.NOFLAG if any(map(str.isupper, words)) else re.IGNORECASE
        pattern = self._pattern = re.compile(re.escape(words), flags) if words else None
        self.found = []
        if pattern is not None:
            self.found = [n for n, line in enumerate(self.lines) if pattern.search(line)]
        self.current = None
        self.refresh()

    def go_to_match(self, step: int) -> None:
        """Show the next match (1) or the one before (-1), seen from where the view is."""
        if not self.found:
            return
        if self.current is None:
            here = round(self.scroll_y)
            at = bisect_left(self.found, here) if step > 0 else bisect_right(self.found, here) - 1
        elif step > 0:
            at = bisect_right(self.found, self.current)
        else:
            at = bisect_left(self.found, self.current) - 1
        self.current = self.found[at % len(self.found)]
        self.following = False
        self.scroll_to(y=self.current - self.size.height // 2, animate=False)
        self.refresh()

    @property
    def place(self) -> tuple[int, int]:
        """Which match this is, from 1 (0 for none yet), and how many there are."""
        at = 0 if self.current is None else bisect_left(self.found, self.current) + 1
        return at, len(self.found)

    # --- drawing ---------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        """The line of the log that is at `y` of the view."""
        left, top = self.scroll_offset
        width, style, number = self.size.width, self.rich_style, top + y
        if number >= len(self.lines):
            return Strip.blank(width, style)
        text = self._styled(number)
        strip = Strip(text.render(self.app.console), cell_len(self.lines[number]))
        return strip.crop_extend(left, left + width, style).apply_offsets(left, number)

    def _styled(self, number: int) -> Text:
        line = self.lines[number]
        text = Text(line, no_wrap=True, end="")
        text.stylize(self.rich_style)
        if self._pattern is not None:
            name = "current" if number == self.current else "match"
            style = self.get_component_rich_style(f"log-view--{name}")
            for match in self._pattern.finditer(line):
                text.stylize(style, *match.span())
        selection = self.text_selection
        if selection is not None and (span := selection.get_span(number)) is not None:
            start, end = span
            style = self.screen.get_component_rich_style("screen--selection")
            text.stylize(style, start, len(line) if end == -1 else end)
        return text

    def get_selection(self, selection: Selection) -> tuple[str, str]:
        """The selected text."""
        return selection.extract("\n".join(self.lines)), "\n"
