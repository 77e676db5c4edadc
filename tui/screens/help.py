"""The keys and the figures, explained on one page."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

KEYS = (
    ("Enter", "send; before the engine is ready the prompt waits its turn"),
    ("Ctrl+J", "new line (Shift+Enter too, where the terminal has it)"),
    ("Esc", "stop the running answer and keep its text"),
    ("Ctrl+N", "new conversation"),
    ("PgUp PgDn", "scroll; Ctrl+Home and Ctrl+End go to either end"),
    ("Ctrl+R", "start the engine again after it has stopped"),
    ("Ctrl+T", "light or dark"),
    ("Ctrl+P", "all commands"),
    ("F1 ?", "this page (? in an empty prompt)"),
    ("Ctrl+C", "copy the selected text; quit if there is none"),
    ("Ctrl+Q", "quit and stop the engine"),
)
FIGURES = (
    ("first token", "time from sending to the first token"),
    ("tok/s", "tokens per second after the first"),
    ("tok/step", "tokens of one decode step; Medusa heads raise it above 1"),
    ("15|15", "decoder layers on each stage"),
    ("new, cached", "prompt tokens computed now, and kept from earlier turns"),
    ("n/a", "not measured yet"),
)


class HelpScreen(ModalScreen[None]):
    """Lists the keys; Esc, F1 or ? closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f1,question_mark,q", "dismiss", "Close")
    ]

    def compose(self) -> ComposeResult:
        """One scrollable page."""
        with VerticalScroll(id="help"):
            yield Static(table("Keys", KEYS))
            yield Static(table("Figures below the prompt", FIGURES), id="figures")


def table(title: str, rows: tuple[tuple[str, str], ...]) -> Content:
    """A titled list with aligned columns."""
    width = max(len(name) for name, _ in rows)
    lines = [Content.styled(title, "bold $primary")]
    lines += [
        Content.assemble((f"{name:<{width}}", "$text-accent"), "  ", text) for name, text in rows
    ]
    return Content("\n").join(lines)
