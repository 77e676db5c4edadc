"""The prompt: a text area that sends on Enter and grows with its text."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from tui.messages import PromptSubmitted
from tui.text import pasted

NEW_LINE_KEYS = ("ctrl+j", "shift+enter", "alt+enter")


class Prompt(TextArea):
    """Enter sends, Ctrl+J makes a new line; a paste of many lines stays one prompt."""

    class HelpWanted(Message):
        """`?` was typed into the empty prompt."""

    class ScrollWanted(Message):
        """A key for the conversation came in here, where the focus always is."""

        def __init__(self, how: str) -> None:
            self.how = how
            super().__init__()

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("pageup", "scroll('page_up')", "Scroll up", show=False),
        Binding("pagedown", "scroll('page_down')", "Scroll down", show=False),
        Binding("ctrl+home", "scroll('home')", "First message", show=False),
        Binding("ctrl+end", "scroll('end')", "Latest message", show=False),
    ]

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, highlight_cursor_line=False, tab_behavior="focus")

    def send(self) -> None:
        """Send the text, unless it is blank."""
        text = self.text.strip("\n")
        if not text.strip():
            return
        self.load_text("")
        self.post_message(PromptSubmitted(text))

    def action_scroll(self, how: str) -> None:
        """Hand a scroll key to the conversation."""
        self.post_message(self.ScrollWanted(how))

    def _on_key(self, event: events.Key) -> None:  # type: ignore[override]
        # Not bindings: those run in another queue, and may overtake letters that were typed
        # before them and still wait in this widget's.
        if event.key == "enter":
            self.send()
        elif event.key in NEW_LINE_KEYS:
            self.insert("\n")
        elif event.character == "?" and not self.text:
            self.post_message(self.HelpWanted())
        else:
            return  # on to TextArea's own handler
        event.stop()
        event.prevent_default()

    def _on_paste(self, event: events.Paste) -> None:  # type: ignore[override]
        event.text = pasted(event.text)  # what TextArea's own handler then inserts
