"""What the conversation shows: the user's words, the model's answer, and what went wrong."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from textual.app import ComposeResult
from textual.await_complete import AwaitComplete
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Markdown, Static
from textual.widgets.markdown import MarkdownStream

from tui.conversation import Ending, Exchange
from tui.text import harmless, log_text
from tui.themes import DIM

DRAIN_TIMEOUT_S = 10.0
SHOWN_LINES = 14


class UserTurn(Static):
    """A prompt as it was sent, in plain text."""

    def __init__(self, text: str) -> None:
        super().__init__(Content(harmless(text)))


class AnswerMarkdown(Markdown):
    """A Markdown document that tells when a stream has nothing left to hand to it."""

    def __init__(self) -> None:
        super().__init__(open_links=False)
        self._took = asyncio.Event()

    def append(self, markdown: str) -> AwaitComplete:
        """As Markdown.append; the source has grown when this returns."""
        result = super().append(markdown)
        self._took.set()
        return result

    async def has_source(self, length: int) -> None:
        """Wait until `length` characters were appended."""
        while len(self.source) < length:
            self._took.clear()
            await self._took.wait()


class AnswerTurn(Vertical):
    """An answer: Markdown as it streams in, and one quiet line about its state."""

    def __init__(self, exchange: Exchange, note: str) -> None:
        super().__init__()
        self.exchange = exchange
        self._markdown = AnswerMarkdown()
        self._note = Static(note, classes="note", markup=False)
        self._stream: MarkdownStream | None = None
        self._written = 0

    def compose(self) -> ComposeResult:
        """The document and the note under it."""
        yield self._markdown
        yield self._note

    def show_note(self, text: str, *, warning: bool = False) -> None:
        """Replace the quiet line; an empty text hides it."""
        self._note.update(text)
        self._note.display = bool(text)
        self._note.set_class(warning, "-warning")

    async def write(self, text: str) -> None:
        """Append a piece of the model's text; rendering follows in the background."""
        if not text:
            return
        if self._stream is None:
            self.show_note("")
            self._stream = Markdown.get_stream(self._markdown)
        safe = harmless(text)
        self._written += len(safe)
        await self._stream.write(safe)

    async def on_unmount(self) -> None:
        """A turn that is removed while it streams leaves no task behind."""
        await self._stop_stream()

    async def _stop_stream(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await stream.stop()

    async def end(self, ending: Ending) -> None:
        """Render what is left and mark how the answer ended."""
        if self._stream is not None:
            # A stream that is stopped with text still waiting would append it while an append
            # is under way, and render lines twice; so wait until it has handed over all.
            with suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_TIMEOUT_S):
                    await self._markdown.has_source(self._written)
            await self._stop_stream()
        elif ending is Ending.STOP:
            self.show_note("(an empty answer)")
            return
        self.show_note(ending.value, warning=ending not in (Ending.STOP, Ending.CANCELLED))


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
