"""The settings of a conversation: its system prompt and how answers are sampled."""

from __future__ import annotations

from typing import Literal

from msgspec.structs import replace
from textual import on
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.message import Message
from textual.widgets import Checkbox, Input, Label, Static, TextArea

from engine.config import JupiterConfig
from engine.protocol import SamplingParams
from tui import sampling
from tui.conversation import Conversation
from tui.text import pasted

LABELS = {
    "temperature": "Temperature",
    "top_p": "Top p",
    "max_tokens": "Most tokens of an answer",
    "seed": "Seed",
}

OUTLINE = "A list's points are written side by side, after a short outline"


class Settings(VerticalScroll):
    """A form that checks each field as it is typed, and tells of every change that is right."""

    DEFAULT_CSS = """
    Settings {
        width: 38;
        height: 1fr;
        padding: 0 1;
        background: $surface;
        border-left: outer $foreground 10%;
        display: none;
        scrollbar-size-vertical: 1;
        .panel-title { height: 1; color: $primary; text-style: bold; }
        Label { margin: 1 0 0 1; color: $foreground 80%; }
        TextArea, Input {
            border: none;
            border-left: outer $foreground 25%;
            padding: 0 1;
            background: $panel;
            &:focus { border: none; border-left: outer $primary; }
        }
        TextArea { height: 5; }
        Input { height: 1; }
        Checkbox { margin: 1 0 0 0; border: none; background: $surface; }
        Input.-wrong, Input.-wrong:focus { border: none; border-left: outer $error; }
        .problem { height: auto; padding: 0 1; color: $text-error; display: none; }
        #settings-note { height: auto; margin: 1 0 0 1; color: $foreground 60%; }
    }
    """

    class Changed(Message):
        """The conversation's settings are now these."""

        def __init__(self, system: str, params: SamplingParams) -> None:
            self.system = system
            self.params = params
            super().__init__()

    def __init__(self, config: JupiterConfig) -> None:
        super().__init__(id="settings", can_focus=False)
        self._config = config
        self._shown = Conversation()

    def compose(self) -> ComposeResult:
        """The system prompt and one field per parameter."""
        yield Static("Settings of this conversation", classes="panel-title")
        yield Label("System prompt")
        yield TextArea(id="system", tab_behavior="focus", placeholder="none")
        for field in sampling.FIELDS:
            yield Label(LABELS[field])
            yield Input(id=f"set-{field}", placeholder=sampling.left_to_config(field, self._config))
            yield Static(id=f"wrong-{field}", classes="problem", markup=False)
        yield Checkbox("Outline answers", id="set-mode", tooltip=OUTLINE)
        yield Static(
            "Saved with the conversation; they hold from the next answer on. "
            "An empty field leaves it to config.json. A top p asks for nucleus sampling.",
            id="settings-note",
        )

    def show(self, conversation: Conversation) -> None:
        """Show a conversation's settings."""
        self._shown = conversation
        with self.prevent(Input.Changed, TextArea.Changed, Checkbox.Changed):
            self.query_one(Checkbox).value = conversation.params.mode == "outline"
            self.query_one(TextArea).load_text(conversation.system)
            for field in sampling.FIELDS:
                self._input(field).value = sampling.shown(conversation.params, field)
                self._show_problem(field, "")

    def focus_first(self) -> None:
        """Take the focus."""
        self.query_one(TextArea).focus()

    def _input(self, field: str) -> Input:
        return self.query_one(f"#set-{field}", Input)

    def _show_problem(self, field: str, problem: str) -> None:
        self._input(field).set_class(bool(problem), "-wrong")
        line = self.query_one(f"#wrong-{field}", Static)
        line.update(problem)
        line.display = bool(problem)

    @on(Input.Changed)
    @on(TextArea.Changed)
    @on(Checkbox.Changed)
    def _changed(self, message: Message) -> None:
        message.stop()
        values: dict[str, float | int | None] = {}
        for field in sampling.FIELDS:
            try:
                values[field] = sampling.checked(field, self._input(field).value)
            except ValueError as error:
                self._show_problem(field, str(error))  # what held before goes on holding
            else:
                self._show_problem(field, "")
        params = sampling.with_values(self._shown.params, values)
        mode: Literal["plain", "outline"] = "plain"
        if self.query_one(Checkbox).value:
            mode = "outline"
        params = replace(params, mode=mode)
        system = pasted(self.query_one(TextArea).text)
        self.post_message(self.Changed(system, params))
