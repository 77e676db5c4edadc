"""What the conversation shows: the user's words, the model's answer, and what went wrong."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Markdown, Static
from textual.widgets.markdown import MarkdownStream

from tui.conversation import Ending, Node
from tui.outline import Point
from tui.text import harmless, log_text
from tui.themes import DIM
from tui.widgets.answer_markdown import AnswerMarkdown
from tui.widgets.outline_board import OutlineBoard
from tui.widgets.turn_bar import Facts, TurnBar

DRAIN_TIMEOUT_S = 10.0
SHOWN_LINES = 14


class Turn(Vertical):
    """One message: its text, and a bar under it with what can be done.

    The keyboard reaches it with Shift+Tab from the prompt. A click does not take the focus from
    the prompt: the bar's words can be clicked.
    """

    FOCUS_ON_CLICK = False
    can_focus = True
    DEFAULT_CSS = """
    Turn {
        width: 1fr;
        height: auto;
        .words {
            height: auto;
            padding: 0 1;
            border-left: outer $primary;
            background: $surface;
        }
        &:focus { background: $primary 10%; }
        &:focus .words { background: $primary 20%; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "pick('copy')", "Copy", id="turn.copy"),
        Binding("e", "pick('edit')", "Edit", id="turn.edit"),
        Binding("r", "pick('regenerate')", "Again", id="turn.regenerate"),
        Binding("c", "pick('continue')", "Continue", id="turn.continue"),
        Binding("b", "pick('code')", "Copy code", id="turn.code"),
        Binding("left", "pick('older')", "‹ Version", id="turn.older"),
        Binding("right", "pick('newer')", "Version ›", id="turn.newer"),
        Binding("up,k", "step(-1)", "Message before", id="turn.up", show=False),
        Binding("down,j", "step(1)", "Message after", id="turn.down", show=False),
    ]

    class Picked(Message):
        """Something is to be done with a message of the conversation."""

        def __init__(self, node: Node, action: str) -> None:
            self.node = node
            self.action = action
            super().__init__()

    class Stepped(Message):
        """The focus is to go `step` messages on."""

        def __init__(self, turn: Turn, step: int) -> None:
            self.turn = turn
            self.step = step
            super().__init__()

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node
        self.bar = TurnBar()

    def show_facts(self, facts: Facts) -> None:
        """Say what can be done with the message now."""
        if facts != self.bar.facts:
            self.bar.facts = facts
            if self.has_focus:
                self.refresh_bindings()

    def on_enter(self) -> None:
        """Offer what can be done under the pointer."""
        self.bar.offering = True

    def on_leave(self) -> None:
        """Be quiet again, unless the pointer only went on to a part of the turn."""
        self.bar.offering = self.has_focus or self.is_mouse_over

    def on_focus(self) -> None:
        """Offer what can be done."""
        self.bar.offering = True

    def on_blur(self) -> None:
        """Be quiet again."""
        self.bar.offering = self.is_mouse_over

    def action_pick(self, action: str) -> None:
        """Ask the screen to do something with the message."""
        self.post_message(self.Picked(self.node, action))

    def action_step(self, step: int) -> None:
        """Ask for the focus to go on."""
        self.post_message(self.Stepped(self, step))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer only what can be done with this message now."""
        return action != "pick" or parameters[0] in self.bar.facts.actions

    def on_turn_bar_picked(self, message: TurnBar.Picked) -> None:
        """A word of the bar was clicked."""
        message.stop()
        self.action_pick(message.action)


class UserTurn(Turn):
    """A prompt as it was sent, in plain text."""

    def compose(self) -> ComposeResult:
        """The text, and the bar under it."""
        yield Static(Content(harmless(self.node.text)), classes="words")
        yield self.bar


class AnswerTurn(Turn):
    """An answer: Markdown as it streams in, or another rendering of the same text in its place.

    It shows what its message has: after the message's text has grown, `grow` shows the rest.
    """

    DEFAULT_CSS = """
    AnswerTurn {
        /* The gap before the next turn is the bar's. */
        MarkdownFence { background: $surface; }
        MarkdownHeader { margin: 0 0 1 0; content-align: left middle; }
    }
    """

    def __init__(self, node: Node, note: str = "") -> None:
        super().__init__(node)
        self._markdown = AnswerMarkdown()
        self._other: Widget | None = None
        self._board: OutlineBoard | None = None
        self._stream: MarkdownStream | None = None
        self._taken = 0
        self._written = 0
        self._note = (note, False)

    def compose(self) -> ComposeResult:
        """The document, and the bar under it."""
        yield self._markdown
        yield self.bar

    async def on_mount(self) -> None:
        """Show the text that is there already, and how it ended."""
        if self.node.text:
            await self._markdown.append(self._take(len(self.node.text)))
        if self.node.ending is not None:
            self._show_ending(self.node.ending)
        else:
            self.show_note(*self._note)

    def show_note(self, text: str, warning: bool = False) -> None:
        """Replace the quiet words about the answer's state; an empty text hides them."""
        self._note = (text, warning)
        self.bar.note = self._note

    async def show_instead(self, other: Widget | None) -> None:
        """Show `other` in the place of the Markdown, which goes on growing; None ends that."""
        if self._other is not None:
            await self._other.remove()
        self._other = other
        self._markdown.display = other is None
        if other is not None:
            await self.mount(other, before=self.bar)

    async def grow(self, end: int | None = None) -> None:
        """Show what was added to the message's text, up to `end`; rendering follows."""
        end = len(self.node.text) if end is None else end
        if not self.is_mounted or self._taken >= end:
            return
        if self._stream is None:
            self.show_note("")
            self._stream = Markdown.get_stream(self._markdown)
        await self._stream.write(self._take(end))

    def _take(self, end: int) -> str:
        text = harmless(self.node.text[self._taken : end])
        self._taken = end
        self._written += len(text)
        return text

    async def show_points(self, opening: str, points: tuple[Point, ...]) -> None:
        """Show an answer's points side by side while they grow; in the Markdown, its `opening`."""
        if not self.is_mounted:
            return
        if self._board is None:
            if self._taken > len(opening):  # this turn is new and has shown all that there was
                await self._stop_stream()
                await self._markdown.remove()
                self._markdown, self._taken, self._written = AnswerMarkdown(), 0, 0
                await self.mount(self._markdown, before=self.bar)
            await self.grow(len(opening))
            self.show_note("")
            self._board = OutlineBoard()
            await self.mount(self._board, before=self.bar)
        await self._board.show(points)

    async def on_unmount(self) -> None:
        """A turn that is removed while it streams leaves no task behind."""
        await self._stop_stream()

    async def _stop_stream(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await stream.stop()

    async def end(self, ending: Ending) -> None:
        """Render what is left and mark how the answer ended."""
        if self._board is not None:
            board, self._board = self._board, None
            await board.remove()
        await self.grow()
        if self._stream is not None:
            # A stream that is stopped with text still waiting would append it while an append
            # is under way, and render lines twice; so wait until it has handed over all.
            with suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_TIMEOUT_S):
                    await self._markdown.has_source(self._written)
            await self._stop_stream()
        self._show_ending(ending)

    def _show_ending(self, ending: Ending) -> None:
        empty = ending is Ending.STOP and not self.node.text
        note = "(an empty answer)" if empty else ending.marker
        self.show_note(note, ending not in (Ending.STOP, Ending.CANCELLED))


class ErrorPanel(Static):
    """Something that went wrong, in the conversation: what, the last log lines, what to do."""

    def __init__(self, title: str, text: str, hint: str) -> None:
        super().__init__()
        self._title = title
        self._hint = hint
        self.show_text(text)

    def show_text(self, text: str) -> None:
        """Replace the text; of a long one the first line and the last ones are shown."""
        first, *rest = log_text(text).strip().splitlines() or ["no reason was given"]
        if len(rest) > SHOWN_LINES:
            rest = ["…", *rest[-SHOWN_LINES:]]
        lines: list[str | tuple[str, str]] = [(self._title, "bold $text-error"), "\n", first]
        if rest:
            lines += ["\n", ("\n".join(rest), DIM)]
        if self._hint:
            lines += ["\n", (self._hint, "$text-accent")]
        self.update(Content.assemble(*lines))
