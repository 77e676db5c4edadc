"""A stage's log: follows the file while it grows, finds words in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Footer, Input, Static

from tui.log_file import LogFile
from tui.text import harmless
from tui.themes import DIM
from tui.widgets.log_view import LogView

POLL_S = 0.25


class LogScreen(Screen[None]):
    """One log file, on top of another screen.

    Args:
        find: the file as it is at the moment, None before there is one. A new launch has a new
            file, and the screen goes over to it.
        title: whose log it is.
    """

    HELP: ClassVar[str] = """
    The log is followed while it grows. Scrolling up stops that, `f` or the end of the log goes on
    with it. `/` searches: Enter goes to the next match, and a capital letter makes case count.

    Colour codes are left out and other control characters made visible. Of a file of more than
    2 MiB only the end is read.
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "close", "Back", id="log.close"),
        Binding("slash", "search", "Search", id="log.search", tooltip="Find words in the log"),
        Binding("n", "go(1)", "Next", id="log.next"),
        Binding("N", "go(-1)", "Previous", id="log.previous", key_display="N"),
        Binding("f", "follow", "Follow", id="log.follow", tooltip="Stay at the end, or stop that"),
        Binding("g", "top", "Start", show=False, id="log.top"),
        Binding("G", "bottom", "End", show=False, id="log.bottom"),
        Binding("y", "copy_path", "Copy path", id="log.copy_path", tooltip="Of the log file"),
    ]
    AUTO_FOCUS = "LogView"
    DEFAULT_CSS = """
    LogScreen {
        #log-title { height: 1; padding: 0 1; background: $panel; }
        #log-note { height: auto; padding: 1 2; color: $foreground 60%; display: none; }
        #log-search { display: none; border: none; height: 1; padding: 0 1; background: $surface; }
        &.-searching #log-search { display: block; }
        &.-empty #log-note { display: block; }
    }
    """

    def __init__(self, find: Callable[[], Path | None], title: str) -> None:
        super().__init__()
        self._file = LogFile(find)
        self._whose = title

    def compose(self) -> ComposeResult:
        """Title, log, the line for the words to search for, keys."""
        yield Static(id="log-title")
        yield Static(id="log-note", markup=False)
        yield LogView(id="log")
        yield Input(id="log-search", placeholder="Search the log")
        yield Footer()

    @property
    def _view(self) -> LogView:
        return self.query_one(LogView)

    def on_mount(self) -> None:
        """Read what is there and look again and again."""
        self.watch(self._view, "following", lambda: self._show_title(), init=False)
        self._poll()
        self.set_interval(POLL_S, self._poll)

    def on_resize(self) -> None:
        """Fit the title to the new width."""
        self._show_title()

    def _poll(self) -> None:
        change = self._file.poll()
        if change.restarted:
            self._view.clear()
            self.notify("The engine was started anew: this is its new log")
        if change.lines or change.partial or change.restarted:
            self._view.add(change.lines, change.partial)
        self.set_class(not self._view.lines, "-empty")
        if not self._view.lines:
            self.query_one("#log-note", Static).update(self._note())
        self._show_title()
        if change.more:
            self.call_after_refresh(self._poll)

    def _note(self) -> str:
        """Why there is nothing to be seen."""
        path = self._file.path
        if path is None:
            return "There is no log yet: the stage has not been started."
        if self._file.problem:
            return harmless(f"{path}: {self._file.problem}")
        return "The log is empty: a stage only writes when there is something to say."

    def _show_title(self) -> None:
        view = self._view
        state = ("● following", "$text-success") if view.following else ("○ not following", DIM)
        at, of = view.place
        words = self.query_one(Input).value
        matches = f"  {at} of {of} matches" if words else ""
        skipped = (
            f"  the first {self._file.skipped >> 20} MiB left out" if self._file.skipped else ""
        )
        lines = f"  {len(view.lines):,} lines{skipped}{matches}"
        right = Content.assemble((lines, DIM), "  ", state)
        path = harmless(str(self._file.path or ""))
        room = max(0, self.size.width - 2 - right.cell_length)
        name = f"Log of {self._whose}  "
        # The end of a path tells more than its beginning.
        rest = room - len(name) - 1
        shown = (
            path if len(path) <= rest else f"…{path[len(path) - rest + 1 :]}" if rest > 8 else ""
        )
        left = Content.assemble((name, "bold"), (shown, DIM))
        self.query_one("#log-title", Static).update(
            Content.assemble(left.truncate(room, ellipsis=True, pad=True), right)
        )

    # --- what the keys do ------------------------------------------------------------------

    def action_close(self) -> None:
        """Back to where this was opened; out of the search first."""
        if self.has_class("-searching"):
            self._end_search(keep=False)
        else:
            self.dismiss()

    def action_search(self) -> None:
        """Ask what to search for."""
        self.add_class("-searching")
        self.query_one(Input).focus()

    def _end_search(self, *, keep: bool) -> None:
        """Leave the input; with `keep` the matches stay marked."""
        words = self.query_one(Input)
        if not keep:
            words.value = ""
        self.set_class(bool(words.value), "-searching")
        self._view.focus()
        self._show_title()

    @on(Input.Changed, "#log-search")
    def _search(self, message: Input.Changed) -> None:
        self._view.search(message.value)
        self.refresh_bindings()
        self._show_title()

    @on(Input.Submitted, "#log-search")
    def _found(self) -> None:
        self._end_search(keep=True)
        self.action_go(1)

    def action_go(self, step: int) -> None:
        """To the next match, or the one before."""
        self._view.go_to_match(step)
        self._show_title()

    def action_follow(self) -> None:
        """Stay at the end from now on, or stay here."""
        self._view.following = not self._view.following

    def action_top(self) -> None:
        """To the first line."""
        self._view.scroll_home(animate=False)

    def action_bottom(self) -> None:
        """To the last line, and follow."""
        self._view.following = True

    def action_copy_path(self) -> None:
        """Put the file's path on the clipboard."""
        path = self._file.path
        if path is not None:
            self.app.copy_to_clipboard(str(path))
            self.notify(str(path), title="Path copied", markup=False)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Matches can be gone through once there is something to search for."""
        if action == "go":
            return self.is_mounted and bool(self.query_one(Input).value)
        return True
