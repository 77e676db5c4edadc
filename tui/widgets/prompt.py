"""The prompt: a text area that sends on Enter and grows with its text."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from tui.messages import PromptSubmitted
from tui.text import pasted


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
        Binding("ctrl+j,shift+enter,alt+enter", "new_line", "New line", show=False),
        Binding("pageup", "scroll('page_up')", "Scroll up", show=False),
        Binding("pagedown", "scroll('page_down')", "Scroll down", show=False),
        Binding("ctrl+home", "scroll('home')", "First message", show=False),
        Binding("ctrl+end", "scroll('end')", "Latest message", show=False),
    ]

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, highlight_cursor_line=False, tab_behavior="focus")

    def action_send(self) -> None:
        """Send the text, unless it is blank."""
        text = self.text.strip("\n")
        if not text.strip():
            return
        self.load_text("")
        self.post_message(PromptSubmitted(text))

    def action_new_line(self) -> None:
        """Insert a new line where the cursor is."""
        self.insert("\n")

    def action_scroll(self, how: str) -> None:
        """Hand a scroll key to the conversation."""
        self.post_message(self.ScrollWanted(how))

    def _on_key(self, event: events.Key) -> None:  # type: ignore[override]
        # Enter is no priority binding: that would run before letters that still wait in the
        # queue of this widget, and send a prompt without its end.
        if event.key == "enter":
            self.action_send()
        elif event.character == "?" and not self.text:
            self.post_message(self.HelpWanted())
        else:
            return  # on to TextArea's own handler
        event.stop()
        event.prevent_default()

    def _on_paste(self, event: events.Paste) -> None:  # type: ignore[override]
        event.text = pasted(event.text)  # what TextArea's own handler then inserts
