"""An answer as its tokens, each in the colour of how it came, with a cursor over them."""

from __future__ import annotations

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style as RichStyle
from textual import events
from textual.binding import Binding, BindingType
from textual.containers import ScrollableContainer
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.style import Style
from textual.widget import Widget

from tui.speculation import ROOT, AnswerTrace
from tui.themes import DIM
from tui.token_layout import TokenLayout

# From the likeliest head to the least likely one; a sixth head starts over. Every theme has these.
_HEADS = (
    "$text-secondary on $secondary-muted",
    "$text-success on $success-muted",
    "$text-warning on $warning-muted",
    "$text-error on $error-muted",
    "$text-accent on $accent-muted underline",
)


def head_style(head: int) -> str:
    """The style of tokens that head number `head` drafted, or of ROOT or UNTRACED ones."""
    if head > ROOT:
        return _HEADS[(head - 1) % len(_HEADS)]
    return "$foreground" if head == ROOT else DIM


class TokenText(Widget, can_focus=True):
    """Follows the end of an answer until the cursor is moved to one of its tokens."""

    DEFAULT_CSS = """
    TokenText {
        width: 1fr;
        height: auto;
        padding: 0 2 0 1;
        border-left: outer $background;
        &:focus { border-left: outer $primary; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "step(-1)", "Token", id="tokens.previous", key_display="←→"),
        Binding("right", "step(1)", "Next token", show=False, id="tokens.next"),
        Binding("up", "line(-1)", "Line up", show=False, id="tokens.up"),
        Binding("down", "line(1)", "Line down", show=False, id="tokens.down"),
        Binding("ctrl+left", "draft(-1)", "Step before", show=False, id="tokens.previous_step"),
        Binding("ctrl+right", "draft(1)", "Next step", show=False, id="tokens.next_step"),
        Binding("home", "first", "First token", show=False, id="tokens.first"),
        Binding("end", "follow", "Follow the end", id="tokens.follow"),
        Binding("pageup", "tree(-1)", "Tree", id="tokens.tree_up", key_display="PgUp/Dn"),
        Binding("pagedown", "tree(1)", "Tree down", show=False, id="tokens.tree_down"),
    ]
    ALLOW_SELECT = False

    cursor: reactive[int | None] = reactive(None, init=False)
    """The token that is looked at; None follows the end."""

    class Moved(Message):
        """The cursor was moved, or the end is followed again."""

        def __init__(self, trace: AnswerTrace, token: int | None) -> None:
            self.trace = trace
            self.token = token
            super().__init__()

    class TreeScrolled(Message):
        """More of the tree is wanted: `by` pages on."""

        def __init__(self, by: int) -> None:
            self.by = by
            super().__init__()

    def __init__(self, trace: AnswerTrace) -> None:
        super().__init__()
        self.trace = trace
        self._layout = TokenLayout(1)

    # --- what it shows -----------------------------------------------------------------------

    def grew(self) -> None:
        """The trace has more tokens."""
        if not self.is_attached or not self.size.width:
            return  # it is not shown; what it will show is laid out then
        before = len(self._layout.lines)
        first = self._layout.add(self.trace.tokens)
        if len(self._layout.lines) != before:
            self.refresh(layout=True)
        else:
            self._refresh_lines(first, before)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """As many lines as the tokens take at this width."""
        if self._layout.width != max(4, width):
            self._layout = TokenLayout(width)
        self._layout.add(self.trace.tokens)
        return max(1, len(self._layout.lines))

    def render_line(self, y: int) -> Strip:
        """One line of tokens."""
        base = self.visual_style.rich_style
        width = self.content_size.width
        lines = self._layout.lines
        if y >= len(lines):
            return Strip.blank(width, base)
        tokens, cursor = self.trace.tokens, self.cursor
        step = None if cursor is None else tokens[cursor].step
        segments = []
        for run in lines[y]:
            token = tokens[run.token]
            style = base + Style.parse(head_style(token.head)).rich_style
            if run.token == cursor:
                style += RichStyle(reverse=True, bold=True)
            elif token.step == step:
                style += RichStyle(underline=True, bold=True)
            segments.append(Segment(run.text, style))
        return Strip(segments).adjust_cell_length(width, base)

    def on_resize(self) -> None:
        """Keep the cursor's token in sight."""
        if self.cursor is not None and self.has_focus:
            self.call_after_refresh(self._show_cursor)

    def _refresh_lines(self, first: int, end: int) -> None:
        left, top = self.gutter.left, self.gutter.top
        self.refresh(Region(left, top + first, self.content_size.width, end - first))

    # --- the cursor --------------------------------------------------------------------------

    def watch_cursor(self, cursor: int | None) -> None:
        """Show the token, and tell what is looked at."""
        self.refresh()
        self._show_cursor()
        self.post_message(self.Moved(self.trace, cursor))

    def _show_cursor(self) -> None:
        if self.cursor is None:
            return
        line, _ = self._layout.place(self.cursor)
        log = next((a for a in self.ancestors if isinstance(a, ScrollableContainer)), None)
        if log is None:
            return
        log.release_anchor()
        y = self.content_region.y + line - log.content_region.y + log.scroll_offset.y
        log.scroll_to_region(Region(0, y, 1, 1), animate=False)

    def action_step(self, by: int) -> None:
        """One token back or on."""
        self._move_to(self._at_or_last() + by)

    def action_draft(self, by: int) -> None:
        """To the first token of a step before or behind."""
        tokens, at = self.trace.tokens, self._at_or_last()
        wanted = tokens[at].step + by if tokens else 0
        starts = [i for i, token in enumerate(tokens) if token.step == wanted]
        self._move_to(starts[0] if starts else at)

    def action_line(self, by: int) -> None:
        """To the token above or below."""
        if not self.trace.tokens:
            return
        line, cell = self._layout.place(self._at_or_last())
        token = self._layout.at(line + by, cell)
        if token is not None:
            self._move_to(token)

    def action_first(self) -> None:
        """To the first token."""
        self._move_to(0)

    def action_follow(self) -> None:
        """Look at the newest token, and at each that comes."""
        self.cursor = None

    def action_tree(self, by: int) -> None:
        """Show more of the tree."""
        self.post_message(self.TreeScrolled(by))

    def on_click(self, event: events.Click) -> None:
        """To the token under the mouse."""
        offset = event.get_content_offset(self)
        token = None if offset is None else self._layout.at(offset.y, offset.x)
        if token is not None:
            self._move_to(token)

    def _at_or_last(self) -> int:
        return len(self.trace.tokens) - 1 if self.cursor is None else self.cursor

    def _move_to(self, token: int) -> None:
        if self.trace.tokens:
            self.cursor = max(0, min(token, len(self.trace.tokens) - 1))
