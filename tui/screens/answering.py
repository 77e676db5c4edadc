"""The part of the chat that asks: a queue of answers to come, and the one that is being given."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from textual import on
from textual.reactive import reactive
from textual.screen import Screen

from engine.errors import EngineError
from engine.protocol import Finished
from tui import messages, metrics
from tui.answer import follow
from tui.autosave import Autosave
from tui.conversation import Conversation, Ending, Node
from tui.metrics import Figures, Meter
from tui.outline import Growing
from tui.sampling import to_go_on
from tui.snapshot import Snapshot
from tui.store import ConversationStore, StoreError
from tui.widgets.bars import StatusLine, TitleBar
from tui.widgets.conversation_view import ConversationView, Latest
from tui.widgets.launch import LaunchCard
from tui.widgets.speculation import SpeculationPanel

if TYPE_CHECKING:
    from tui.session import EngineSession
    from tui.widgets.turn import AnswerTurn
    from tui.widgets.turn_bar import Facts


@dataclass
class Running:
    """The request that is being answered."""

    request_id: str
    node: Node
    meter: Meter
    before: str = ""
    """What the answer had before this request, which goes on with it."""
    growing: Growing = field(default_factory=Growing)
    """What this request has added."""


class AnsweringScreen(Screen[None]):
    """Owns the conversation, the queue of answers to come, and the running answer.

    What an answer has so far is in the conversation's tree; the view shows it where its branch is
    shown. So a branch may be left and come back to while it is being answered.
    """

    snapshot: reactive[Snapshot | None] = reactive(None, init=False)
    running: reactive[Running | None] = reactive(None, init=False, bindings=True)

    def __init__(self, session: EngineSession) -> None:
        super().__init__()
        self._session = session
        self.conversation = Conversation()
        self.store = ConversationStore()
        self.autosave = Autosave(self.store, self._saved)
        self._queue: deque[Node] = deque()
        self._launch = LaunchCard(session.snapshot)

    @property
    def view(self) -> ConversationView:
        """The shown branch."""
        return self.query_one(ConversationView)

    @property
    def speculation(self) -> SpeculationPanel:
        """How the answers' tokens came."""
        return self.query_one(SpeculationPanel)

    @property
    def model(self) -> str:
        """The model whose tokens are written now."""
        return self._session.config.base_model_name_or_path

    def _saved(self, error: StoreError | None) -> None:
        """A conversation was written, or could not be."""

    def _facts(self, node: Node) -> Facts:
        from tui.widgets.turn_bar import Facts

        talk = self.conversation
        siblings = talk.siblings(node)
        at = siblings.index(node)
        offers = {
            "older": at > 0,
            "newer": at < len(siblings) - 1,
            "copy": bool(node.text.strip()),
            "edit": not node.is_answer,
            "regenerate": node.ending is not None,
            "continue": talk.can_continue(node, self.model),
            "code": node.is_answer and ("```" in node.text or "~~~" in node.text),
        }
        actions = frozenset(action for action, offered in offers.items() if offered)
        return Facts(at + 1, len(siblings), actions)

    # --- asking ----------------------------------------------------------------------------

    @on(messages.PromptSubmitted)
    async def _add_prompt(self, message: messages.PromptSubmitted) -> None:
        edited = message.instead_of
        after = edited.parent if edited is not None else None
        await self._answer(self.conversation.ask(message.text, after=after))

    async def _answer(self, node: Node) -> None:
        """Have an answer given, or gone on with, when its turn has come."""
        if node in self._queue or (self.running is not None and self.running.node is node):
            return  # the key was pressed twice
        node.ending = None
        self._queue.append(node)
        self.autosave.save(self.conversation)
        self.view.to_latest()
        await self._show_branch()
        self._send_next()

    async def _show_branch(self) -> None:
        await self.view.show(self.conversation, self._waiting_note)
        await self.speculation.attach(self.view.turns)
        await self._show_points()
        self.refresh_bindings()

    @on(ConversationView.MoreShown)
    async def _more_shown(self) -> None:
        await self.speculation.attach(self.view.turns)

    def _waiting_note(self, node: Node) -> str:
        running = self.running
        if running is not None and running.node is node:
            return "sent"
        return f"waits for the {'answer above' if running is not None else 'engine'}"

    def _send_next(self) -> None:
        """Send the first queued prompt if the engine is ready and nothing runs."""
        ready = self.snapshot is not None and self.snapshot.phase == "ready"
        if self.running is not None or not ready or not self._queue:
            return
        node, talk = self._queue.popleft(), self.conversation
        answered = tuple(node.token_ids) if node.model == self.model else ()
        params, transcript = talk.params, talk.transcript_for(node, self.model)
        if answered:
            params = to_go_on(params, self._session.config, len(answered))
            transcript = node.asked or transcript
        try:
            stream = self._session.ask(
                talk.messages_for(node),
                params=params,
                transcript=transcript,
                answered=answered,
                trace=self.speculation.asked(node) and params.mode == "plain",
            )
        except EngineError:
            self._queue.appendleft(node)  # it has just died: its last snapshot is under way
            return
        node.model = self.model
        meter = Meter(time.monotonic())
        self.running = Running(stream.request_id, node, meter, before=node.text)
        self._note("sent")
        self.view.refresh_facts()
        self.run_worker(follow(stream.request_id, stream, self.post_message), group="answers")

    def action_stop_answer(self) -> None:
        """Stop the running answer within one step; its text stays."""
        if self.running is not None:
            self._session.cancel(self.running.request_id)

    async def _leave(self, conversation: Conversation) -> None:
        """Show another conversation; of this one a running answer and queued prompts end."""
        self.action_stop_answer()
        left = [*self._queue, *([self.running.node] if self.running else [])]
        for node in left:
            self.conversation.end(node, Ending.CANCELLED)
        self._queue.clear()
        self.running = None
        if left:
            self.autosave.save(self.conversation)
        self.conversation = conversation
        self.speculation.open(conversation.id)
        self._show_figures(Figures())
        await self._show_branch()
        self.view.to_latest()

    # --- answers ---------------------------------------------------------------------------

    def watch_running(self, running: Running | None) -> None:
        """Tell whether an answer runs."""
        self.query_one(TitleBar).answering = running is not None
        self.query_one(Latest).answering = running is not None

    def _of(self, message: messages.AnswerMessage) -> Running | None:
        """The running answer, if `message` is about it and not about one that was left."""
        running = self.running
        return running if running and running.request_id == message.request_id else None

    def _turn(self) -> AnswerTurn | None:
        """The running answer's turn, where its branch is shown."""
        return self.view.answer_turn(self.running.node) if self.running else None

    def _note(self, text: str) -> None:
        turn = self._turn()
        if turn is not None:
            turn.show_note(text)

    @on(messages.AnswerStarted)
    def _answer_started(self, message: messages.AnswerStarted) -> None:
        if running := self._of(message):
            running.node.asked = message.started.transcript
            running.meter.started(message.started)
            new = metrics.count(running.meter.figures.prefilled_tokens)
            self._note(f"reading {new} tokens")
            self._show_figures(running.meter.figures)

    @on(messages.AnswerGrew)
    async def _answer_grew(self, message: messages.AnswerGrew) -> None:
        if running := self._of(message):
            running.meter.tokens(len(message.token_ids), message.at)
            first = not running.node.text
            for event in message.events:
                running.growing.add(event)
            if running.growing.points:
                # In the order in which they came, these tokens are no text to go on from.
                running.node.text = running.before + running.growing.text
                running.node.token_ids = []
            else:
                running.node.text += message.text
                running.node.token_ids += message.token_ids
            self.autosave.save_growing(self.conversation)
            await self._show_points()
            if turn := self._turn():
                if not running.growing.points:
                    await turn.grow()
                if first:
                    turn.show_facts(self._facts(running.node))  # it can be copied now
            await self.speculation.grew(running.node, message.steps, self._turn())
            self._show_figures(running.meter.figures)

    async def _show_points(self) -> None:
        """Show the running answer's points side by side, where it has any."""
        running, turn = self.running, self._turn()
        if running is not None and turn is not None and (points := running.growing.points):
            await turn.show_points(running.before + running.growing.opening, points)

    @on(messages.AnswerFinished)
    async def _answer_finished(self, message: messages.AnswerFinished) -> None:
        if running := self._of(message):
            finished = message.finished
            if finished.transcript is not None:
                self.conversation.remember(running.node, finished.transcript)
            running.meter.finished(finished)
            self.speculation.ended(running.node, finished.metrics)
            self._show_figures(running.meter.figures)
            await self._end(running, ending_of(finished))

    @on(messages.AnswerFailed)
    async def _answer_failed(self, message: messages.AnswerFailed) -> None:
        from tui.widgets.turn import ErrorPanel

        if running := self._of(message):
            failed = message.failed
            too_long = failed.code == "prompt_too_long"
            title = "This prompt does not fit" if too_long else "This prompt was not answered"
            hint = "A shorter prompt may fit; Ctrl+N starts a new conversation" if too_long else ""
            if turn := self._turn():
                panel = ErrorPanel(title, failed.message, hint)
                panel.add_class("refusal")
                await self.view.column.mount(panel, after=turn)
            await self._end(running, Ending.REFUSED)

    @on(messages.AnswerLost)
    async def _answer_lost(self, message: messages.AnswerLost) -> None:
        if running := self._of(message):
            quitting = self.snapshot is not None and self.snapshot.phase == "stopping"
            await self._end(running, Ending.INTERRUPTED if quitting else Ending.ENGINE_LOST)

    async def _end(self, running: Running, ending: Ending) -> None:
        self.conversation.end(running.node, ending)
        self.autosave.save(self.conversation)
        if turn := self._turn():
            await turn.end(ending)
        if self.running is running:
            self.running = None
            self.view.refresh_facts()
        self._send_next()

    def _show_figures(self, figures: Figures) -> None:
        self.query_one(StatusLine).figures = figures


def ending_of(finished: Finished) -> Ending:
    """How an answer ended, from the engine's last event about it."""
    if finished.finish_reason == "cancelled":
        return Ending.CANCELLED
    if finished.finish_reason == "stop":
        return Ending.STOP
    return Ending.CONTEXT_FULL if finished.context_full else Ending.LENGTH
