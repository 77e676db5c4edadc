"""Help for the screen it is opened on: its keys as they are now, and what it shows."""

from __future__ import annotations

from textwrap import dedent
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen, Screen
from textual.widgets import Footer, Markdown, Static

from tui.themes import DIM

NARROW = 100
"""Below so many columns the panel covers the screen, which is beside it otherwise."""
WIDTH = 64


class HelpScreen(ModalScreen[None]):
    """A panel on the right; Esc, F1, ? or a click beside it closes it."""

    DEFAULT_CSS = """
    HelpScreen {
        align: right top;
        background: transparent;

        #help {
            width: 64;
            height: 1fr;
            padding: 0 1;
            background: $surface;
            border: round $primary;
            border-title-color: $primary;
            &:ansi { background: ansi_default; }
        }
        #help > Static { height: auto; margin: 0 1; }
        #help > Markdown { margin: 1 0 0 0; padding: 0 1; background: transparent; }
        #help MarkdownHeader { margin: 0 0 1 0; content-align: left middle; }
        &.-narrow #help { width: 100%; }
        Footer { width: 100%; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f1,question_mark,q", "dismiss", "Close", id="help.close")
    ]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (NARROW, "-wide")]  # noqa: RUF012 (as Textual's own)

    def __init__(self, about: Screen[object], title: str) -> None:
        super().__init__()
        self._about = about
        self._title = title

    def compose(self) -> ComposeResult:
        """The keys, then the screen's own words."""
        with VerticalScroll(id="help") as panel:
            panel.border_title = f"Help: {self._title}"
            yield Static(key_table(self._about, self._width))
            if self._about.HELP:
                yield Markdown(dedent(self._about.HELP).strip(), open_links=False)
        yield Footer()

    @property
    def _width(self) -> int:
        """Cells for a line of text: the panel without its edges and the scrollbar."""
        columns = self.app.size.width
        return (columns if columns < NARROW else WIDTH) - 7

    def on_click(self, event: events.Click) -> None:
        """A click beside the panel closes it."""
        if event.widget is self:
            self.dismiss()


def key_table(screen: Screen[object], width: int) -> Content:
    """All keys of the screen, of what has the focus on it, and of the app, in `width` cells.

    Each line has the keys, what they do, and the id for the `keymap` of config.json.
    """
    keys: dict[str, list[str]] = {}
    words: dict[str, str] = {}
    for _, bindings in screen._modal_binding_chain:
        for key, binding in bindings:
            if binding.id is None or binding.system or not binding.description:
                continue
            shown = screen.app.get_key_display(binding.with_key(key))
            keys.setdefault(binding.id, []).append(shown)
            words.setdefault(binding.id, binding.tooltip or binding.description)
    column = max((len(" ".join(shown)) for shown in keys.values()), default=0)
    lines = [Content.styled("Keys", "bold $primary")]
    for name, names in keys.items():
        left = Content.styled(f"{' '.join(names):<{column}}  ", "$text-accent")
        room = max(0, width - left.cell_length - len(name) - 2)
        text = Content(words[name]).truncate(room, ellipsis=True, pad=True)
        lines.append(Content.assemble(left, text, "  ", (name, DIM)))
    return Content("\n").join(lines)
