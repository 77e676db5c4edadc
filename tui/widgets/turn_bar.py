"""The line under a message: its state, which version it is, and what can be done with it."""

from __future__ import annotations

from dataclasses import dataclass

from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.style import Style
from textual.widget import Widget

from tui.themes import DIM

WORDS = {
    "copy": "copy",
    "code": "copy code",
    "edit": "edit",
    "regenerate": "again",
    "continue": "continue",
}
GAP = "   "


@dataclass(frozen=True)
class Facts:
    """What a message's bar tells and offers."""

    version: int = 1
    versions: int = 1
    actions: frozenset[str] = frozenset()
    """Of WORDS, and "older" and "newer" where there is such a version."""


class TurnBar(Widget):
    """One line, mostly blank: it is the gap to the next message too.

    What can be done shows while `offering`; a cut-off answer offers its continuation always.
    """

    DEFAULT_CSS = """
    TurnBar {
        width: 1fr;
        height: 1;
        padding: 0 2;
        color: $foreground 60%;
        link-style: none;
        link-color: $text-accent;
        link-style-hover: bold;
        link-background-hover: $primary 20%;
    }
    """

    facts: reactive[Facts] = reactive(Facts())
    note: reactive[tuple[str, bool]] = reactive(("", False))
    """Quiet words, and whether they are a warning."""
    offering: reactive[bool] = reactive(False)

    class Picked(Message):
        """One of the words was clicked. To the message's turn."""

        def __init__(self, action: str) -> None:
            self.action = action
            super().__init__()

    def action_pick(self, action: str) -> None:
        """Tell the turn."""
        self.post_message(self.Picked(action))

    def render(self) -> Content:
        """Note, version and words, as far as they apply."""
        parts = []
        text, warning = self.note
        if text:
            parts.append(Content.styled(text, "$text-warning" if warning else f"italic {DIM}"))
        if self.facts.versions > 1:
            parts.append(self._version())
        shown = [word for word in WORDS if word in self.facts.actions]
        if not self.offering:
            shown = [word for word in shown if word == "continue"]
        if shown:
            parts.append(Content(" · ").join([link(WORDS[word], word) for word in shown]))
        return Content(GAP).join(parts)

    def _version(self) -> Content:
        older = link("‹", "older") if "older" in self.facts.actions else Content.styled("‹", DIM)
        newer = link("›", "newer") if "newer" in self.facts.actions else Content.styled("›", DIM)
        return Content.assemble(older, f" {self.facts.version}/{self.facts.versions} ", newer)


def link(word: str, action: str) -> Content:
    """A word that can be clicked."""
    return Content.styled(word, Style.from_meta({"@click": f"pick('{action}')"}))
