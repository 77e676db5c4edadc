"""Small questions over the screen: yes or no, one line of text, one of a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, OptionList, Static
from textual.widgets.option_list import Option

from engine.errors import JupiterError
from tui.text import harmless
from tui.themes import DIM

Result = TypeVar("Result")


class Dialog(ModalScreen[Result]):
    """A box in the middle of the screen; Esc closes it without a result."""

    DEFAULT_CSS = """
    Dialog {
        align: center middle;
        & > Vertical {
            width: 64;
            max-width: 100%;
            height: auto;
            max-height: 100%;
            padding: 1 2;
            background: $surface;
            border: round $primary;
        }
        Static { height: auto; margin: 0 0 1 0; }
        .problem { color: $text-error; margin: 0; display: none; }
        Input { border: round $foreground 25%; background: $background; }
        Input:focus { border: round $primary 60%; }
        OptionList {
            height: auto;
            max-height: 12;
            border: none;
            background: $surface;
        }
        Horizontal { height: auto; align-horizontal: right; }
        Button { margin: 0 0 0 2; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close", id="dialog.close")
    ]


class Confirm(Dialog[bool]):
    """Asks whether something is to be done that cannot be undone."""

    def __init__(self, question: str, word: str) -> None:
        super().__init__()
        self._question = question
        self._word = word

    def compose(self) -> ComposeResult:
        """The question; the harmless answer has the focus."""
        with Vertical():
            yield Static(Content(harmless(self._question)))
            with Horizontal():
                yield Button("Keep", id="no", compact=True)
                yield Button(self._word, id="yes", variant="error", compact=True)

    @on(Button.Pressed)
    def _answered(self, message: Button.Pressed) -> None:
        self.dismiss(message.button.id == "yes")


class AskLine(Dialog[str]):
    """Asks for one line of text, which `use` may refuse with a JupiterError.

    Args:
        title: what is asked for.
        text: what stands there first.
        use: does what the text is for; the dialog stays open while it refuses.
    """

    def __init__(self, title: str, text: str, use: Callable[[str], None]) -> None:
        super().__init__()
        self._title = title
        self._text = text
        self._use = use

    def compose(self) -> ComposeResult:
        """Title, field, and a line for what is wrong."""
        with Vertical():
            yield Static(Content.assemble((self._title, "bold"), ("   Enter · Esc closes", DIM)))
            yield Input(self._text)
            yield Static(classes="problem", markup=False)

    @on(Input.Submitted)
    def _submitted(self, message: Input.Submitted) -> None:
        try:
            self._use(message.value)
        except JupiterError as error:
            problem = self.query_one(".problem", Static)
            problem.update(harmless(str(error)))
            problem.display = True
        else:
            self.dismiss(message.value)


class Pick(Dialog[int]):
    """Asks for one of several things; the result is its index."""

    def __init__(self, title: str, choices: Sequence[Content]) -> None:
        super().__init__()
        self._title = title
        self._choices = choices

    def compose(self) -> ComposeResult:
        """The title and the list."""
        with Vertical():
            yield Static(Content.assemble((self._title, "bold"), ("   Enter · Esc closes", DIM)))
            yield OptionList(*(Option(choice) for choice in self._choices))

    @on(OptionList.OptionSelected)
    def _picked(self, message: OptionList.OptionSelected) -> None:
        self.dismiss(message.option_index)
