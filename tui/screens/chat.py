"""The chat: a conversation with the model, one answer at a time."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.reactive import reactive
from textual.screen import Screen
from textual.widgets import Footer

from engine.errors import EngineError
from engine.protocol import Finished
from tui import messages, metrics
from tui.answer import follow
from tui.conversation import Conversation, Ending, Exchange
from tui.metrics import Figures, Meter
from tui.snapshot import Snapshot
from tui.widgets.bars import StatusLine, TitleBar
from tui.widgets.launch import LaunchCard
from tui.widgets.prompt import Prompt

if TYPE_CHECKING:
    from textual.widgets import Markdown

    from tui.session import EngineSession
    from tui.widgets.turn import AnswerTurn, ErrorPanel

ASK = "Ask something · Enter sends · Ctrl+J new line · ? help"
ASK_EARLY = "Type ahead: Enter sends as soon as the engine is ready"


@dataclass
class Running:
    """The request that is being answered."""

    request_id: str
    turn: AnswerTurn
    meter: Meter


class ChatScreen(Screen[None]):
    """Owns the conversation, the queue of prompts and the running answer."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop_answer", "Stop"),
        Binding("ctrl+r", "restart_engine", "Restart engine"),
        Binding("ctrl+n", "new_conversation", "New"),
    ]
    AUTO_FOCUS = "#prompt"

    snapshot: reactive[Snapshot | None] = reactive(None, init=False)
    running: reactive[Running | None] = reactive(None, init=False, bindings=True)

    def __init__(self, session: EngineSession) -> None:
        super().__init__()
        self._session = session
        self.conversation = Conversation()
        self._queue: deque[AnswerTurn] = deque()
        self._launch = LaunchCard(session.snapshot)
        self._failure: ErrorPanel | None = None

    def compose(self) -> ComposeResult:
        """Title, conversation, prompt, figures, keys."""
        yield TitleBar()
        with VerticalScroll(id="scroll", can_focus=False), Vertical(id="conversation"):
            yield self._launch
        with Vertical(id="prompt-row"):
            yield Prompt(id="prompt")
        yield StatusLine()
        yield Footer()

    def on_mount(self) -> None:
        """Show what the configuration tells, before there is an engine."""
        self._scroll.anchor()
        self.snapshot = self._session.snapshot

    @property
    def _scroll(self) -> VerticalScroll:
        return self.query_one("#scroll", VerticalScroll)

    @property
    def _log(self) -> Vertical:
        return self.query_one("#conversation", Vertical)

    # --- the engine ------------------------------------------------------------------------

    async def watch_snapshot(self, old: Snapshot | None, new: Snapshot) -> None:
        """Show the engine's state; an engine that got ready gets the first queued prompt."""
        self.query_one(TitleBar).snapshot = new
        self.query_one(StatusLine).split = new.split
        self.query_one(Prompt).placeholder = ASK if new.phase == "ready" else ASK_EARLY
        if old is not None and old.launch not in (0, new.launch):
            self._launch, self._failure = LaunchCard(new), None
            await self._log.mount(self._launch)
        self._launch.show(new)
        if new.phase == "failed" and self._log.is_attached:  # not so when the run is ending
            await self._show_failure(new)
        self.refresh_bindings()
        self._send_next()

    async def _show_failure(self, snapshot: Snapshot) -> None:
        from tui.widgets.turn import ErrorPanel

        if self._failure is not None:
            self._failure.show_text(snapshot.detail)
            return
        title = "The engine stopped" if snapshot.ready else "The engine did not start"
        self._failure = ErrorPanel(title, snapshot.detail, "Ctrl+R starts it again")
        await self._log.mount(self._failure)

    def action_restart_engine(self) -> None:
        """Start the engine anew; queued prompts are sent when it is ready."""
        self.run_worker(self._session.start(), group="engine")

    # --- asking ----------------------------------------------------------------------------

    @on(messages.PromptSubmitted)
    async def _add_prompt(self, message: messages.PromptSubmitted) -> None:
        # Markdown is a slow import that the first paint does without.
        from tui.widgets.turn import AnswerTurn, UserTurn

        exchange = Exchange(message.text)
        self.conversation.exchanges.append(exchange)
        busy = self.running is not None
        turn = AnswerTurn(exchange, f"waits for the {'answer above' if busy else 'engine'}")
        self._queue.append(turn)
        self._scroll.scroll_end(animate=False)
        await self._log.mount(UserTurn(message.text), turn)
        self._send_next()

    def _send_next(self) -> None:
        """Send the first queued prompt if the engine is ready and nothing runs."""
        ready = self.snapshot is not None and self.snapshot.phase == "ready"
        if self.running is not None or not ready or not self._queue:
            return
        turn = self._queue.popleft()
        try:
            stream = self._session.ask(self.conversation.messages_for(turn.exchange))
        except EngineError:
            self._queue.appendleft(turn)  # it has just died: its last snapshot is under way
            return
        turn.show_note("sent")
        self.running = Running(stream.request_id, turn, Meter(time.monotonic()))
        self.run_worker(follow(stream.request_id, stream, self.post_message), group="answers")

    def action_stop_answer(self) -> None:
        """Stop the running answer within one step; its text stays."""
        if self.running is not None:
            self._session.cancel(self.running.request_id)

    def action_new_conversation(self) -> None:
        """Leave this conversation, a running answer and queued prompts included."""
        self.action_stop_answer()
        self.running = None
        self._queue.clear()
        self.conversation = Conversation()
        self._show_figures(Figures())
        self._log.query("UserTurn, AnswerTurn, .refusal").remove()
        self.query_one(Prompt).focus()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer only what the state allows."""
        match action:
            case "stop_answer":
                return self.running is not None
            case "restart_engine":
                return self.snapshot is not None and self.snapshot.phase == "failed"
        return True

    # --- answers ---------------------------------------------------------------------------

    def watch_running(self, running: Running | None) -> None:
        """Tell on the title bar whether an answer runs."""
        self.query_one(TitleBar).answering = running is not None

    def _of(self, message: messages.AnswerMessage) -> Running | None:
        """The running answer, if `message` is about it and not about one that was left."""
        running = self.running
        return running if running and running.request_id == message.request_id else None

    @on(messages.AnswerStarted)
    def _answer_started(self, message: messages.AnswerStarted) -> None:
        if running := self._of(message):
            running.meter.started(message.started)
            new = metrics.count(running.meter.figures.prefilled_tokens)
            running.turn.show_note(f"reading {new} tokens")
            self._show_figures(running.meter.figures)

    @on(messages.AnswerGrew)
    async def _answer_grew(self, message: messages.AnswerGrew) -> None:
        if running := self._of(message):
            running.meter.tokens(message.tokens, message.at)
            running.turn.exchange.answer += message.text
            await running.turn.write(message.text)
            self._show_figures(running.meter.figures)

    @on(messages.AnswerFinished)
    async def _answer_finished(self, message: messages.AnswerFinished) -> None:
        if running := self._of(message):
            running.meter.finished(message.finished)
            self._show_figures(running.meter.figures)
            await self._end(running, ending_of(message.finished))

    @on(messages.AnswerFailed)
    async def _answer_failed(self, message: messages.AnswerFailed) -> None:
        from tui.widgets.turn import ErrorPanel

        if running := self._of(message):
            failed = message.failed
            too_long = failed.code == "prompt_too_long"
            title = "This prompt does not fit" if too_long else "This prompt was not answered"
            hint = "A shorter prompt may fit; Ctrl+N starts a new conversation" if too_long else ""
            panel = ErrorPanel(title, failed.message, hint)
            panel.add_class("refusal")
            await self._log.mount(panel, after=running.turn)
            await self._end(running, Ending.REFUSED)
            running.turn.display = bool(running.turn.exchange.answer)

    @on(messages.AnswerLost)
    async def _answer_lost(self, message: messages.AnswerLost) -> None:
        if running := self._of(message):
            await self._end(running, Ending.ENGINE_LOST)

    async def _end(self, running: Running, ending: Ending) -> None:
        running.turn.exchange.ending = ending
        await running.turn.end(ending)
        if self.running is running:
            self.running = None
        self._send_next()

    def _show_figures(self, figures: Figures) -> None:
        self.query_one(StatusLine).figures = figures

    # --- around the conversation -----------------------------------------------------------

    @on(Prompt.ScrollWanted)
    def _scroll_wanted(self, message: Prompt.ScrollWanted) -> None:
        log = self._scroll
        match message.how:
            case "page_up":
                log.scroll_page_up(animate=False)
            case "page_down":
                log.scroll_page_down(animate=False)
            case "home":
                log.scroll_home(animate=False)
            case "end":
                log.scroll_end(animate=False)

    @on(Prompt.HelpWanted)
    async def _help(self) -> None:
        await self.run_action("app.help")

    def on_markdown_link_clicked(self, message: Markdown.LinkClicked) -> None:
        """Copy a link of the model; where it leads is the user's to see and to decide."""
        self.app.copy_to_clipboard(message.href)
        self.notify(message.href, title="Link copied", markup=False)


def ending_of(finished: Finished) -> Ending:
    """How an answer ended, from the engine's last event about it."""
    if finished.finish_reason == "cancelled":
        return Ending.CANCELLED
    if finished.finish_reason == "stop":
        return Ending.STOP
    return Ending.CONTEXT_FULL if finished.context_full else Ending.LENGTH
