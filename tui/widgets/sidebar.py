"""The list of conversations: find one, open it, give it another title, delete it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from tui.store import Entry, Listing
from tui.text import harmless
from tui.themes import DIM

LINE_CELLS = 25


class Sidebar(Vertical):
    """Shows a Listing; asks for one that has the words of its search field."""

    DEFAULT_CSS = """
    Sidebar {
        width: 34;
        height: 1fr;
        padding: 0 1;
        background: $surface;
        border-right: outer $foreground 10%;
        display: none;
        .panel-title { height: 1; color: $primary; text-style: bold; }
        Input {
            border: round $foreground 25%;
            background: $surface;
            &:focus { border: round $primary 60%; }
        }
        OptionList {
            height: 1fr;
            border: none;
            padding: 0;
            background: $surface;
            scrollbar-size-vertical: 1;
            scrollbar-gutter: stable;
            &:focus { border: none; background-tint: $foreground 0%; }
            & > .option-list--option { padding: 0 1; }
            & > .option-list--option-highlighted {
                background: $primary 15%;
                color: $foreground;
                text-style: none;
            }
            &:focus > .option-list--option-highlighted { background: $primary 35%; }
        }
        #sidebar-note { height: auto; max-height: 8; color: $text-warning; }
        #sidebar-keys { height: auto; color: $foreground 60%; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "pick('rename')", "Rename", id="sidebar.rename"),
        Binding("d,delete", "pick('delete')", "Delete", id="sidebar.delete"),
        Binding("slash", "search", "Search", id="sidebar.search"),
    ]

    class Wanted(Message):
        """A listing of the conversations with these words is wanted."""

        def __init__(self, query: str) -> None:
            self.query = query
            super().__init__()

    class Picked(Message):
        """Something is to be done with a conversation: "open", "rename" or "delete"."""

        def __init__(self, entry: Entry, action: str) -> None:
            self.entry = entry
            self.action = action
            super().__init__()

    def __init__(self) -> None:
        super().__init__(id="sidebar")
        self._listing = Listing()
        self._current = ""

    def compose(self) -> ComposeResult:
        """Search field, list, and what could not be read."""
        yield Static("Conversations", classes="panel-title")
        yield Input(placeholder="Search titles and texts", id="sidebar-search")
        yield OptionList(id="sidebar-list")
        yield Static(id="sidebar-note", markup=False)

    @property
    def query_text(self) -> str:
        """What is searched for."""
        return self.query_one("#sidebar-search", Input).value

    @property
    def options(self) -> OptionList:
        """The list."""
        return self.query_one(OptionList)

    def show(self, listing: Listing, current: str) -> None:
        """Show a listing, with the conversation `current` marked; the highlight stays."""
        self._listing, self._current = listing, current
        options = self.options
        highlighted = self._highlighted()
        wanted = highlighted.id if highlighted else current
        time = datetime.now(UTC)
        options.clear_options()
        options.add_options(
            Option(entry_line(entry, time, entry.id == current), id=entry.id)
            for entry in listing.entries
        )
        ids = [entry.id for entry in listing.entries]
        if ids:
            options.highlighted = ids.index(wanted) if wanted in ids else 0
        self._show_note()

    def _show_note(self) -> None:
        note = self.query_one("#sidebar-note", Static)
        folder = f"{self._listing.folder}/"
        count = len(self._listing.problems)
        lines = [f"{count} file{'s' if count > 1 else ''} cannot be read:"] if count else []
        lines += [harmless(problem.removeprefix(folder)) for problem in self._listing.problems[:2]]
        if not self._listing.entries:
            lines.insert(0, "nothing found" if self.query_text.strip() else "none yet")
        note.update("\n".join(lines))
        note.display = bool(lines)

    def _highlighted(self) -> Entry | None:
        at = self.options.highlighted
        entries = self._listing.entries
        return entries[at] if at is not None and at < len(entries) else None

    def focus_list(self) -> None:
        """Take the focus: the list, or the search field where there is none."""
        (self.options if self._listing.entries else self.query_one(Input)).focus()

    def action_search(self) -> None:
        """Go to the search field."""
        self.query_one(Input).focus()

    def action_pick(self, action: str) -> None:
        """Ask for something to be done with the highlighted conversation."""
        if entry := self._highlighted():
            self.post_message(self.Picked(entry, action))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """The keys of the list are letters in the search field."""
        if action in ("pick", "search"):
            return self.options.has_focus
        return True

    @on(Input.Changed)
    def _search(self, message: Input.Changed) -> None:
        message.stop()
        self.post_message(self.Wanted(message.value))

    @on(Input.Submitted)
    def _searched(self, message: Input.Submitted) -> None:
        message.stop()
        self.focus_list()

    @on(OptionList.OptionSelected)
    def _open(self, message: OptionList.OptionSelected) -> None:
        message.stop()
        self.post_message(self.Picked(self._listing.entries[message.option_index], "open"))


def entry_line(entry: Entry, time: datetime, current: bool) -> Content:
    """Two lines about a conversation: its title; when it was used or where the words are."""
    title = Content.styled(harmless(entry.title).replace("\n", " "), "bold" if current else "")
    mark = ("● ", "$text-success") if current else ("  ", "")
    below = Content.styled(harmless(entry.snippet) or age(entry.updated_at, time), DIM)
    lines = [line.truncate(LINE_CELLS, ellipsis=True) for line in (title, below)]
    return Content.assemble(mark, lines[0], "\n  ", lines[1])


def age(then: datetime, time: datetime) -> str:
    """How long ago, as people say it: `5 min ago`, `yesterday 14:03`, `22 Nov 2025`."""
    seconds = (time - then).total_seconds()
    local = then.astimezone()
    days = (time.astimezone().date() - local.date()).days
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{int(seconds // 60)} min ago"
    if days == 0:
        return f"today {local:%H:%M}"
    if days == 1:
        return f"yesterday {local:%H:%M}"
    return f"{local.day} {local:%b}" if days < 300 else f"{local.day} {local:%b %Y}"
