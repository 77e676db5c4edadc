"""The shown branch of a conversation, and the launches of the engine between its messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

from tui.conversation import Conversation, Node
from tui.themes import DIM
from tui.widgets.launch import LaunchCard

if TYPE_CHECKING:
    from tui.widgets.turn import AnswerTurn, Turn
    from tui.widgets.turn_bar import Facts


SHOWN_AT_ONCE = 12
"""Messages that are shown of a conversation that is opened, and added at its top."""
MOST_SHOWN = 60
"""Above so many shown messages the first ones are left out again."""


class Log(Vertical):
    """The column of messages; tells when its height has changed."""

    class Grew(Message):
        """There are more lines, or fewer. To the view."""

    def on_resize(self) -> None:
        """Tell the view."""
        self.post_message(self.Grew())


class Earlier(Widget):
    """Says that a long conversation has more messages above; shows them when it is reached."""

    FOCUS_ON_CLICK = False
    can_focus = True
    DEFAULT_CSS = """
    Earlier {
        width: 1fr;
        height: 2;
        display: none;
        text-align: center;
        color: $text-accent;
        &:hover { text-style: bold; }
        &:focus { text-style: reverse; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,up", "want", "Earlier messages", id="turn.earlier"),
    ]

    messages: reactive[int] = reactive(0)

    class Wanted(Message):
        """Earlier messages are wanted. To the view."""

    def watch_messages(self, messages: int) -> None:
        """Be there only if there is something."""
        self.display = messages > 0

    def render(self) -> Content:
        """How much there is."""
        return Content(f"↑ {self.messages} earlier messages")

    def want(self) -> None:
        """Ask for them, if there are any."""
        if self.messages:
            self.post_message(self.Wanted())

    def action_want(self) -> None:
        """As a click does."""
        self.want()

    def on_click(self) -> None:
        """As the key does."""
        self.want()


class ConversationView(VerticalScroll):
    """Shows the branch that `show` is given; follows its end until the user scrolls up."""

    class Below(Message):
        """So many lines are below what is shown."""

        def __init__(self, lines: int) -> None:
            self.lines = lines
            super().__init__()

    class MoreShown(Message):
        """Earlier messages of the branch are shown now. To the chat screen."""

    def __init__(self, launch: LaunchCard, facts: Callable[[Node], Facts]) -> None:
        super().__init__(id="scroll", can_focus=False)
        self._launch = launch
        self._facts = facts
        self._showing = asyncio.Lock()
        self._below = 0
        self._earlier = Earlier()
        self._path: list[Node] = []
        self._notes: Callable[[Node], str] = lambda node: ""

    def compose(self) -> ComposeResult:
        """The column, with the engine's launch on top."""
        with Log(id="conversation"):
            yield self._launch
            yield self._earlier

    def on_mount(self) -> None:
        """Follow the end from the start."""
        self.anchor()

    @property
    def column(self) -> Log:
        """The column of messages."""
        return self.query_one(Log)

    @property
    def turns(self) -> list[Turn]:
        """The shown messages in their order."""
        from tui.widgets.turn import Turn

        return list(self.column.query_children(Turn))

    def answer_turn(self, node: Node) -> AnswerTurn | None:
        """The turn of an answer, where it is shown."""
        from tui.widgets.turn import AnswerTurn

        shown = self.column.query_children(AnswerTurn)
        return next((turn for turn in shown if turn.node is node), None)

    async def show(self, conversation: Conversation, notes: Callable[[Node], str]) -> None:
        """Show a conversation's chosen branch; turns that are shown already stay.

        Of a branch that is new here only the end is shown, `show_earlier` shows more.

        Args:
            conversation: the one to show.
            notes: the quiet words under an answer that has not begun.
        """
        async with self._showing:
            path, turns = conversation.path(), self.turns
            start = path.index(turns[0].node) if turns and turns[0].node in path else len(path)
            kept = 0
            while (
                kept < min(len(path) - start, len(turns)) and turns[kept].node is path[start + kept]
            ):
                kept += 1
            if not kept:
                start = max(0, len(path) - SHOWN_AT_ONCE)
            gone: list[Widget] = [*turns[kept:]]
            if gone or not kept:
                gone += self.column.query_children(".refusal")
            await self.column.remove_children(gone)
            await self._mount(path[start + kept :], notes)
            self._path, self._notes = path, notes
            await self._forget_oldest()
            self._count_earlier()

    async def show_earlier(self) -> None:
        """Show more of the branch above what is shown; that stays where it is."""
        async with self._showing:
            hidden = self._earlier.messages
            if not hidden:
                return
            nodes = self._path[max(0, hidden - SHOWN_AT_ONCE) : hidden]
            below = self.max_scroll_y - self.scroll_y
            self.release_anchor()
            await self._mount(nodes, self._notes, on_top=True)
            self._count_earlier()
        self.call_after_refresh(self._keep_place, below)
        self.post_message(self.MoreShown())

    def _keep_place(self, below: float) -> None:
        self.scroll_to(y=self.max_scroll_y - below, animate=False)

    async def _mount(
        self, nodes: Sequence[Node], notes: Callable[[Node], str], *, on_top: bool = False
    ) -> None:
        # Markdown is a slow import that the first paint does without.
        from tui.widgets.turn import AnswerTurn, UserTurn

        new = [
            AnswerTurn(node, notes(node)) if node.is_answer else UserTurn(node) for node in nodes
        ]
        await self.column.mount_all(new, after=self._earlier if on_top else None)
        self.refresh_facts()

    async def _forget_oldest(self) -> None:
        """Keep a conversation that grows and grows quick: its first turns can be had again."""
        turns = self.turns
        if len(turns) > MOST_SHOWN and not self._below:
            first = turns[-SHOWN_AT_ONCE]
            old = self.column.children[: self.column.children.index(first)]
            turns_only = [part for part in old if not isinstance(part, LaunchCard | Earlier)]
            await self.column.remove_children(turns_only)

    def _count_earlier(self) -> None:
        turns = self.turns
        self._earlier.messages = self._path.index(turns[0].node) if turns else 0

    def refresh_facts(self) -> None:
        """Have each bar tell what can be done with its message now."""
        for turn in self.turns:
            turn.show_facts(self._facts(turn.node))

    def focus_step(self, turn: Turn | None, step: int) -> bool:
        """Move the focus to another message, from `turn` or from below the last; False if none."""
        turns = self.turns
        at = (turns.index(turn) if turn in turns else len(turns)) + step
        if at < 0 and self._earlier.messages:
            self._earlier.focus()
            return True
        if not 0 <= at < len(turns):
            return False
        turns[at].focus()
        return True

    # --- what is below -----------------------------------------------------------------------

    def to_latest(self) -> None:
        """Show the end, and follow it again."""
        self.scroll_end(animate=False)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Tell how much is below; at the top, show what is before."""
        super().watch_scroll_y(old_value, new_value)
        self.call_after_refresh(self._tell_below)
        if new_value <= 0 < old_value:
            self._earlier.want()

    async def on_earlier_wanted(self) -> None:
        """Show what is before."""
        await self.show_earlier()

    def on_log_grew(self) -> None:
        """Tell how much is below, once an anchored view has followed."""
        self.call_after_refresh(self._tell_below)

    def _tell_below(self) -> None:
        below = max(0, round(self.max_scroll_y - self.scroll_target_y))
        if below != self._below:
            self._below = below
            self.post_message(self.Below(below))


class Latest(Widget):
    """The line between conversation and prompt: blank, or the way back to the end."""

    DEFAULT_CSS = """
    Latest {
        height: 1;
        content-align: center middle;
        color: $text-accent;
        &.-below:hover { background: $primary 20%; }
    }
    """

    below: reactive[int] = reactive(0)
    answering: reactive[bool] = reactive(False)

    class Wanted(Message):
        """The end of the conversation is wanted. To the chat screen."""

    def watch_below(self, below: int) -> None:
        """Look like something to click, or like nothing."""
        self.set_class(below > 0, "-below")

    def render(self) -> Content:
        """How much is below, and how to get there."""
        if not self.below:
            return Content("")
        lines = f"{self.below} line{'s' if self.below > 1 else ''} below"
        more = " · the answer goes on" if self.answering else ""
        return Content.assemble(f"↓ {lines}{more}", ("  Ctrl+End", DIM))

    def on_click(self) -> None:
        """Go there."""
        if self.below:
            self.post_message(self.Wanted())
