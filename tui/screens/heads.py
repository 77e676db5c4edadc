"""A finished run's heads go into the chat; what they bring is measured before and after."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Static

from engine.config import JupiterConfig
from engine.errors import JupiterError
from tui import metrics
from tui.heads_switch import (
    MOST_TOKENS,
    Measured,
    Sample,
    config_with,
    heads_name,
    measure,
    same_answers,
    sample,
)
from tui.run_folders import RunFolder
from tui.text import harmless
from tui.themes import DIM

if TYPE_CHECKING:
    from tui.session import EngineSession

LABEL, COLUMN = 18, 20


class HeadsScreen(ModalScreen[None]):
    """Asks how to switch, shows what is being done, then both measurements side by side."""

    DEFAULT_CSS = """
    HeadsScreen {
        align: center middle;
        #heads {
            width: 76;
            max-width: 100%;
            height: auto;
            max-height: 100%;
            padding: 0 2;
            background: $surface;
            border: round $primary;
            border-title-color: $primary;
            &:ansi { background: ansi_default; }
        }
        VerticalScroll { height: auto; max-height: 80vh; scrollbar-size-vertical: 1; }
        Static { height: auto; }
        #doing { margin: 1 0 0 0; }
        #figures { margin: 1 0 0 0; }
        Horizontal { height: auto; margin: 1 0 0 0; }
        Button { margin: 0 2 0 0; min-width: 10; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Close", id="heads.close", tooltip="Leave things as they are")
    ]

    def __init__(self, session: EngineSession, run: RunFolder) -> None:
        super().__init__()
        self._session = session
        self._trained = run
        self._old = session.config
        self._busy = False
        self._sample: Sample | None = None

    def compose(self) -> ComposeResult:
        """What would be switched, the figures, and what can be done."""
        with Vertical(id="heads") as panel:
            panel.border_title = "Heads into the chat"
            with VerticalScroll(can_focus=False):
                yield Static(id="about")
                yield Static(id="doing")
                yield Static(id="figures")
            with Horizontal():
                yield Button("Measure and switch", variant="primary", id="measured", compact=True)
                yield Button("Just switch", id="plain", compact=True)
                yield Button("Go back", id="back", compact=True)
                yield Button("Close", id="close", compact=True)

    async def on_mount(self) -> None:
        """Find the questions; where there are none, the switch alone is offered."""
        self._offer()
        problem = ""
        try:
            self._new = config_with(self._old, self._trained)
        except JupiterError as error:
            self._tell(str(error), "$text-error")
            return
        try:
            self._sample = await asyncio.to_thread(sample, self._trained)
        except JupiterError as error:
            problem = str(error)
        self.query_one("#about", Static).update(self._about(problem))
        self._offer("plain") if self._sample is None else self._offer("measured", "plain")

    def _about(self, problem: str) -> Content:
        ready = self._session.snapshot.ready
        number = None if ready is None else ready.medusa_num_heads
        lines = [
            f"now   {heads_name(self._old, number)}",
            f"then  {heads_name(self._new)}",
        ]
        if self._new.base_model_name_or_path != self._old.base_model_name_or_path:
            base = self._new.base_model_name_or_path
            lines.append(f"The base model changes as well, to {base}: its answers differ.")
        if self._sample is not None:
            count = len(self._sample.questions)
            lines.append("")
            lines.append(
                f"Measured in the chat's own engine, before and after: greedy answers of at most "
                f"{MOST_TOKENS} tokens to {count} question{'s' if count > 1 else ''} from "
                f"{self._sample.origin}."
            )
        if problem:
            lines += ["", f"It cannot be measured: {problem}"]
        return Content(harmless("\n".join(lines)))

    def _offer(self, *names: str) -> None:
        """Show these buttons, and Close."""
        for button in self.query(Button):
            button.display = button.id in (*names, "close")
            button.disabled = False
        first = names[0] if names and names[0] != "back" else "close"
        self.query_one(f"#{first}").focus()

    def _tell(self, text: str, style: str = "$text-warning") -> None:
        self.query_one("#doing", Static).update(Content.styled(harmless(text), style))

    # --- the switch --------------------------------------------------------------------------

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        event.stop()
        match event.button.id:
            case "close":
                self.action_close()
            case "measured":
                self.run_worker(self._switch(measured=True), group="heads")
            case "plain":
                self.run_worker(self._switch(measured=False), group="heads")
            case "back":
                self.run_worker(self._go_back(), group="heads")

    def action_close(self) -> None:
        """Close, unless the engine is just being changed."""
        if not self._busy:
            self.dismiss()

    async def _switch(self, *, measured: bool) -> None:
        self._set_busy(True)
        before = after = None
        try:
            if measured and self._sample is not None:
                before = await self._measure("before")
            await self._apply(self._new)
            if measured and self._sample is not None:
                after = await self._measure("after")
        except JupiterError as error:
            self._set_busy(False)
            switched = self._session.config == self._new
            self._offer("back") if switched else self._offer()
            self._tell(str(error), "$text-error")
            return
        self._set_busy(False)
        self._offer("back")
        self._tell("The chat goes on with the new heads.", "$text-success")
        if before is not None and after is not None:
            self.query_one("#figures", Static).update(side_by_side(before, after))

    async def _measure(self, when: str) -> Measured:
        assert self._sample is not None
        return await measure(
            self._session,
            self._sample.questions,
            lambda done, of: self._tell(
                f"measuring {when} the switch: question {done + 1} of {of}"
            ),
        )

    async def _go_back(self) -> None:
        self._set_busy(True)
        try:
            await self._apply(self._old)
        except JupiterError as error:
            self._tell(str(error), "$text-error")
        else:
            self._tell("The chat is back on the heads it had.", "$text-success")
        self._set_busy(False)
        self._offer()

    async def _apply(self, config: JupiterConfig) -> None:
        """Change the engine, and show meanwhile what it is busy with."""
        ticker = self.set_interval(0.1, self._tell_phase)
        try:
            await self._session.apply(config)
        finally:
            ticker.stop()

    def _tell_phase(self) -> None:
        self._tell(f"changing the engine: {self._session.snapshot.detail}")

    def _set_busy(self, busy: bool) -> None:
        self._busy = busy
        for button in self.query(Button):
            button.disabled = busy


def side_by_side(before: Measured, after: Measured) -> Content:
    """Both measurements as a table, and whether they compare like with like."""
    rows = [
        ("", "before", "after"),
        ("heads", _heads(before), _heads(after)),
        ("tokens per step", _two(before.tokens_per_step), _two(after.tokens_per_step)),
        ("speed", metrics.rate(before.tokens_per_s), metrics.rate(after.tokens_per_s)),
        ("decode steps", f"{before.steps:,}", f"{after.steps:,}"),
    ]
    for head in range(max(len(before.proposed), len(after.proposed))):
        rows.append((f"head {head + 1} accepted", _share(before, head), _share(after, head)))
    lines = [
        Content.assemble(
            (f"{label:<{LABEL}}", DIM),
            (f"{left:>{COLUMN}}", "bold" if not label else ""),
            (f"{right:>{COLUMN}}", "bold" if not label else "$text-primary"),
        )
        for label, left, right in rows
    ]
    same = (
        "Both times the same answers, token for token."
        if same_answers(before, after)
        else "The answers were not the same, so the figures compare different texts."
    )
    return Content("\n").join([*lines, Content(""), Content.styled(same, DIM)])


def _heads(measured: Measured) -> str:
    tree = "tuned tree" if measured.tree_size is None else f"tree of {measured.tree_size}"
    return f"{measured.heads}, {tree}" if measured.heads else "none"


def _two(value: float | None) -> str:
    return metrics.UNKNOWN if value is None else f"{value:.2f}"


def _share(measured: Measured, head: int) -> str:
    """Steps whose accepted path reached the head, of those whose tree did."""
    if head >= len(measured.proposed) or not measured.proposed[head]:
        return metrics.UNKNOWN
    accepted, proposed = measured.accepted[head], measured.proposed[head]
    return f"{accepted}/{proposed}  {accepted / proposed * 100:3.0f} %"
