"""`jupiter-tui`'s application: its screens, its themes, and the life of the engine under it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import TextArea

from engine.config import JupiterConfig
from engine.errors import ExitCode
from engine.paths import state_dir
from tui.messages import EngineChanged, EngineNotice
from tui.screens.chat import ChatScreen
from tui.session import ClientFactory, EngineSession
from tui.themes import DARK, LIGHT


class JupiterApp(App[int]):
    """Shows the chat at once and starts the engine after the first paint.

    The result of a run is the exit code.
    """

    TITLE = "Jupiter"
    CSS_PATH = Path(__file__).with_name("app.tcss")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "help", "Help"),
        Binding("ctrl+t", "toggle_theme", "Light or dark", show=False),
        Binding("ctrl+q", "quit", "Quit", priority=True),
        Binding("ctrl+c", "copy_or_quit", "Copy, or quit", show=False, priority=True),
    ]

    def __init__(self, config: JupiterConfig, make_client: ClientFactory | None = None) -> None:
        super().__init__()
        self.session = EngineSession(config, self.post_message, make_client)
        self.register_theme(DARK)
        self.register_theme(LIGHT)
        self.theme = DARK.name
        self._chat = ChatScreen(self.session)
        self._leaving = False

    def get_default_screen(self) -> Screen[None]:
        """The chat."""
        return self._chat

    def on_ready(self) -> None:
        """The first frame is out: now the engine."""
        self.run_worker(self._launch(), group="engine")

    # --- the engine ------------------------------------------------------------------------

    async def _launch(self) -> None:
        await self.session.start()
        error = self.session.error
        if error is not None and error.exit_code == ExitCode.BAD_INPUT:
            # Nothing that could be done from in here: another flag, file or model is needed.
            await self.leave(error.exit_code)

    @on(EngineChanged)
    def _engine_changed(self, message: EngineChanged) -> None:
        self._chat.snapshot = message.snapshot

    @on(EngineNotice)
    def _engine_notice(self, message: EngineNotice) -> None:
        self.notify(message.text, markup=False)

    # --- leaving ---------------------------------------------------------------------------

    async def leave(self, code: int) -> None:
        """Stop the engine, then end the run with `code`; a second call changes nothing."""
        if self._leaving:
            return
        self._leaving = True
        await self.session.stop()
        self.exit(code)

    def end_run(self, code: int) -> None:
        """Leave in the background, so that the screen can show that the engine is stopping."""
        self.run_worker(self.leave(code), group="leave")

    async def action_quit(self) -> None:
        """Quit and stop the engine."""
        self.end_run(ExitCode.OK)

    def action_copy_or_quit(self) -> None:
        """Ctrl+C: copy what is selected, else quit."""
        focused = self.screen.focused
        in_prompt = focused.selected_text if isinstance(focused, TextArea) else ""
        selected = in_prompt or self.screen.get_selected_text()
        if selected:
            self.copy_to_clipboard(selected)
            self.notify("Copied")
        else:
            self.end_run(ExitCode.OK)

    def _fatal_error(self) -> None:
        """A mistake in the program: one line for the user, the traceback in a file."""
        path = state_dir() / "logs" / "crash.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(traceback.format_exc(), encoding="utf-8")
            where = f"details in {path}"
        except OSError as error:
            where = f"details could not be kept: {error}"
        line = f"jupiter-tui: internal error: {self._exception!r}; {where}"
        self._exit_renderables.append(Text(line))
        self._close_messages_no_wait()

    # --- commands --------------------------------------------------------------------------

    def action_help(self) -> None:
        """Show the keys and what the figures mean."""
        from tui.screens.help import HelpScreen

        if not isinstance(self.screen, HelpScreen):
            self.push_screen(HelpScreen())

    def action_toggle_theme(self) -> None:
        """Change between the light and the dark theme."""
        self.theme = LIGHT.name if self.current_theme.dark else DARK.name

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """What the command palette offers: only what the state allows."""
        chat = self._chat
        offers: tuple[tuple[str, str, str, Callable[[], object]], ...] = (
            ("stop_answer", "Stop", "Stop the running answer", chat.action_stop_answer),
            ("new_conversation", "New conversation", "Start afresh", chat.action_new_conversation),
            ("restart_engine", "Restart engine", "Start it again", chat.action_restart_engine),
        )
        for action, title, text, run in offers:
            if chat.check_action(action, ()):
                yield SystemCommand(title, text, run)
        yield SystemCommand("Light or dark", "Change the theme", self.action_toggle_theme)
        yield SystemCommand("Help", "The keys, and what the figures mean", self.action_help)
        yield SystemCommand("Quit", "Stop the engine and quit", self.action_quit)
