"""The prompt: a text area that sends on Enter and grows with its text."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from tui.conversation import Node
from tui.history import PromptHistory
from tui.messages import PromptSubmitted
from tui.text import pasted

NEW_LINE_KEYS = ("ctrl+j", "shift+enter", "alt+enter")


class Prompt(TextArea):
    """Enter sends, Ctrl+J makes a new line; a paste of many lines stays one prompt.

    Up in the first line and Down in the last bring back earlier prompts. With `change` an earlier
    prompt is changed and sent anew.
    """

    class HelpWanted(Message):
        """`?` was typed into the empty prompt."""

    class ScrollWanted(Message):
        """A key for the conversation came in here, where the focus always is."""

        def __init__(self, how: str) -> None:
            self.how = how
            super().__init__()

    class HistoryLost(Message):
        """A prompt could not be written to the history's file."""

        def __init__(self, error: OSError) -> None:
            self.error = error
            super().__init__()

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("pageup", "scroll('page_up')", "Scroll up", id="prompt.page_up", show=False),
        Binding(
            "pagedown", "scroll('page_down')", "Scroll down", id="prompt.page_down", show=False
        ),
        Binding("ctrl+home", "scroll('home')", "First message", id="prompt.first", show=False),
        Binding("ctrl+end", "scroll('end')", "Latest message", id="prompt.latest", show=False),
        # As in a shell; Ctrl+Z suspends the workbench.
        Binding("ctrl+underscore", "undo", "Undo", id="prompt.undo", show=False),
    ]

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, highlight_cursor_line=False, tab_behavior="focus")
        self.sent = PromptHistory()
        self.editing: Node | None = None
        self._draft = ""
        self._note: str | None = None

    def show_note(self, note: str | None) -> None:
        """Say on the frame how the next prompt will be answered; None for as ever."""
        self._note = note
        if self.editing is None:
            self.border_subtitle = note

    def send(self) -> None:
        """Send the text, unless it is blank."""
        text = self.text.strip("\n")
        if not text.strip():
            return
        editing, draft = self.editing, self._draft
        self._leave_editing()
        self.load_text(draft if editing else "")
        self._cursor_to_end()
        try:
            self.sent.add(text)
        except OSError as error:
            self.post_message(self.HistoryLost(error))
        self.post_message(PromptSubmitted(text, editing))

    def change(self, node: Node) -> None:
        """Have an earlier prompt changed; what was being typed comes back afterwards."""
        if self.editing is None:
            self._draft = self.text
        self.editing = node
        self.border_title = "Editing an earlier prompt"
        self.border_subtitle = "Enter sends it as a new branch · Esc leaves it"
        self._show(node.text)
        self.focus()

    def stop_editing(self) -> None:
        """Leave the earlier prompt as it is."""
        draft = self._draft
        self._leave_editing()
        self._show(draft)

    def _leave_editing(self) -> None:
        self.editing, self._draft = None, ""
        self.border_title, self.border_subtitle = None, self._note

    def action_scroll(self, how: str) -> None:
        """Hand a scroll key to the conversation."""
        self.post_message(self.ScrollWanted(how))

    def _show(self, text: str) -> None:
        self.load_text(text)
        self._cursor_to_end()

    def _cursor_to_end(self) -> None:
        self.move_cursor(self.document.end)

    def _row(self) -> int:
        """The line of the cursor as it is shown: long lines are several."""
        return self.wrapped_document.location_to_offset(self.cursor_location).y

    def _from_history(self, key: str) -> bool:
        """Show another prompt if the cursor cannot move that way; False if it can."""
        if key == "up" and self._row() == 0:
            text = self.sent.older(self.text)
        elif key == "down" and self._row() == self.wrapped_document.height - 1:
            text = self.sent.newer()
        else:
            return False
        if text is None:
            return False
        self._show(text)
        return True

    def _on_key(self, event: events.Key) -> None:  # type: ignore[override]
        # Not bindings: those run in another queue, and may overtake letters that were typed
        # before them and still wait in this widget's.
        if event.key == "enter":
            self.send()
        elif event.key in NEW_LINE_KEYS:
            self.insert("\n")
        elif event.character == "?" and not self.text:
            self.post_message(self.HelpWanted())
        elif not self._from_history(event.key):
            return  # on to TextArea's own handler
        event.stop()
        event.prevent_default()

    def _on_paste(self, event: events.Paste) -> None:  # type: ignore[override]
        event.text = pasted(event.text)  # what TextArea's own handler then inserts
