"""The panel beside the chat: what the heads are worth, and the draft tree of one step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from textual import events
from textual.app import ComposeResult
from textual.containers import Container, Vertical, VerticalScroll
from textual.reactive import reactive
from textual.widgets import Static

from engine.protocol import Metrics, StepTrace, TreeChosen
from tui.speculation import AnswerTrace, Speculation
from tui.widgets.speculation_content import acceptance, tree
from tui.widgets.token_text import TokenText

if TYPE_CHECKING:
    from tui.conversation import Node
    from tui.widgets.turn import AnswerTurn, Turn

BESIDE = 100
"""Below so many columns the panel is under the conversation."""


class SpeculationPanel(Container):
    """Figures of the conversation, and the tree of the token looked at or of the latest step.

    While it is `on`, answers are asked with a trace, and those that have one are shown as tokens.
    """

    DEFAULT_CSS = """
    SpeculationPanel {
        display: none;
        dock: right;
        width: 46;
        height: 1fr;
        border-left: solid $foreground 20%;
        layout: vertical;

        &.-on { display: block; }
        & > #acceptance { width: 1fr; height: auto; padding: 0 1; }
        & > #tree {
            height: 1fr;
            padding: 0 0 0 1;
            margin: 1 0 0 0;
            scrollbar-size-vertical: 1;
            scrollbar-gutter: stable;
        }
        & > #tree > Static { height: auto; }

        &.-below {
            dock: initial;
            width: 1fr;
            height: 35%;
            min-height: 9;
            max-height: 18;
            border-left: none;
            border-top: solid $foreground 20%;
            layout: horizontal;

            & > #acceptance { width: 44; }
            & > #tree { width: 1fr; margin: 0; }
        }
    }
    """

    on: reactive[bool] = reactive(False)
    heads: reactive[int | None] = reactive(None)
    """Medusa heads of the engine, None while there is none; what others drafted stays shown."""
    tuned: reactive[TreeChosen | None] = reactive(None)
    """What the engine's tuner chose last; None where the tree is fixed."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._all: dict[str, Speculation] = {"": Speculation()}
        self._conversation = ""
        self._tracing: set[int] = set()
        self._looked_at: tuple[AnswerTrace | None, int | None] = (None, None)
        self._acceptance = Static()
        self._acceptance.id = "acceptance"
        self._tree = Static()

    def compose(self) -> ComposeResult:
        """Figures, and below or beside them the tree."""
        yield self._acceptance
        with VerticalScroll(id="tree", can_focus=False):
            yield self._tree

    @property
    def speculation(self) -> Speculation:
        """Of the conversation that is shown."""
        return self._all[self._conversation]

    # --- what happens in the chat ------------------------------------------------------------

    def open(self, conversation: str) -> None:
        """Another conversation is shown; what was traced of it in this run is still known."""
        self._conversation = conversation
        self._all.setdefault(conversation, Speculation())
        self._tracing.clear()
        self.look_at(self.speculation.latest, None)

    def asked(self, answer: Node) -> bool:
        """Tells whether the answer that is about to be asked for is to be traced."""
        self._tracing.discard(answer.id)
        if self.on:
            self._tracing.add(answer.id)
            self.speculation.begin(answer.id, answer.text)
            self.look_at(self.speculation.latest, None)
        return self.on

    async def grew(self, answer: Node, steps: Iterable[StepTrace], turn: AnswerTurn | None) -> None:
        """An answer has grown by what these steps made; `turn` shows it, if anything does."""
        if answer.id not in self._tracing:
            return
        self.speculation.grew(answer.id, steps, answer.text)
        if turn is not None:
            await self.attach([turn])
            for text in turn.query(TokenText):
                text.grew()
        self.show()

    def ended(self, answer: Node, metrics: Metrics) -> None:
        """An answer has ended."""
        if answer.id not in self._tracing:
            self.speculation.ended_untraced(metrics)
        self._tracing.discard(answer.id)
        self.show()

    async def attach(self, turns: Iterable[Turn]) -> None:
        """Show answers as tokens where that is wanted and known, else as they were."""
        for turn in turns:
            trace = self.speculation.traces.get(turn.node.id)
            shown = turn.query(TokenText)
            if not turn.node.is_answer:
                continue
            answer = cast("AnswerTurn", turn)
            if self.on and trace is not None and trace.tokens:
                if not shown:
                    trace.catch_up(turn.node.text)
                    await answer.show_instead(TokenText(trace))
            elif shown:
                await answer.show_instead(None)

    # --- what is shown -----------------------------------------------------------------------

    def look_at(self, trace: AnswerTrace | None, token: int | None) -> None:
        """Show the tree of this token's step; None for the latest step."""
        self._looked_at = (trace, token)
        self.show()
        if self.is_mounted:
            self.query_one("#tree").scroll_home(animate=False)

    def scroll_tree(self, pages: int) -> None:
        """Show the part of the tree that is so many pages further down."""
        tree = self.query_one("#tree")
        tree.scroll_relative(y=pages * max(1, tree.size.height - 1), animate=False)

    def watch_on(self, on: bool) -> None:
        """Appear or go."""
        self.set_class(on, "-on")
        self.call_after_refresh(self.show)

    def watch_heads(self) -> None:
        """Another engine: other lines."""
        self.show()

    def watch_tuned(self) -> None:
        """Another choice, or newer figures of it."""
        self.show()

    def on_resize(self) -> None:
        """Fit the tree to the new width."""
        self.show()

    def show(self) -> None:
        """Show the present state."""
        if not (self.is_mounted and self.on):
            return
        known = self.speculation
        self._acceptance.update(acceptance(known.recent, known.whole, self.heads, self.tuned))
        width = self.query_one("#tree").scrollable_content_region.width
        self._tree.update(tree(*self._looked_at, width))


class SpeculationColumn(Vertical):
    """Conversation and prompt, with the panel on their right or, where that is narrow, between."""

    def on_resize(self, event: events.Resize) -> None:
        """Find the panel its place."""
        self.query_one(SpeculationPanel).set_class(event.size.width < BESIDE, "-below")
