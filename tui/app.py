"""`jupiter-tui`'s application: its screens, its themes, and the life of the engine under it."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import time
import traceback
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from rich.text import Text
from textual import on
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen, Screen
from textual.widgets import TextArea

from engine.config import JupiterConfig
from engine.errors import ExitCode
from engine.paths import make_private, state_dir
from tui import preferences
from tui.commands import offers
from tui.keys import checked_keymap
from tui.messages import EngineChanged, EngineNotice
from tui.modes import MODES, AsksBeforeLeaving, ShowsEngine
from tui.session import ClientFactory, EngineSession
from tui.speeds import SpeedStore
from tui.store import write_private
from tui.telemetry import TelemetryStore
from tui.themes import ANSI_DARK, THEMES, colours, default_theme, partner

if TYPE_CHECKING:
    from engine.nodes.hub import Hub
    from tui.screens.chat import ChatScreen


GC_THRESHOLDS = (20_000, 20, 50)
"""New objects make the collector look at the young ones, and seldom at the older ones."""


class JupiterApp(App[int]):
    """Shows the chat at once and starts the engine after the first paint.

    The result of a run is the exit code.
    """

    TITLE = "Jupiter"
    DEFAULT_MODE = "chat"
    CSS_PATH = Path(__file__).with_name("app.tcss")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "help", "Help", show=False, id="app.help"),  # the title bar shows it
        *(
            Binding(
                mode.key,
                f"open_mode('{mode.name}')",
                mode.title,
                tooltip=mode.about,
                show=False,  # the title bar shows them
                id=mode.binding_id,
            )
            for mode in MODES
        ),
        Binding("ctrl+t", "toggle_theme", "Light or dark", show=False, id="app.light_or_dark"),
        Binding(
            "f12", "change_theme", "Theme", show=False, tooltip="Choose the colours", id="app.theme"
        ),
        # Also in the prompt, where undo is Ctrl+_ then, as in a shell.
        Binding(
            "ctrl+z",
            "suspend_process",
            "Suspend",
            show=False,
            priority=True,
            id="app.suspend",
            tooltip="Back to the shell; `fg` goes on",
        ),
        Binding(
            "ctrl+q",
            "quit",
            "Quit",
            priority=True,
            id="app.quit",
            tooltip="Stop the engine and quit",
        ),
        Binding(
            "ctrl+c", "copy_or_quit", "Copy, or quit", show=False, priority=True, id="app.copy"
        ),
    ]

    def __init__(
        self,
        config: JupiterConfig,
        make_client: ClientFactory | None = None,
        *,
        config_given: str | None = None,
        hub: Hub | None = None,
    ) -> None:
        """`config_given` is the path of `--config`, if there was one; `hub` has other machines."""
        plain = "NO_COLOR" in os.environ or colours(os.environ) == 0
        if plain:
            os.environ["NO_COLOR"] = "1"  # Textual looks here, and for shades of grey if not ANSI
        super().__init__(ansi_color=True if plain else None)
        self.config_given = config_given
        self.set_keymap(checked_keymap(config.keymap))
        self.session = EngineSession(config, self.post_message, make_client, hub)
        self.telemetry = TelemetryStore(time.monotonic)
        self.session.add_listener(self.telemetry.on_update)
        self.speeds = SpeedStore()
        self.session.add_listener(self.speeds.on_update)
        for theme in THEMES:
            self.register_theme(theme)
        self.theme = ANSI_DARK.name if plain else default_theme(os.environ)
        for mode in MODES:
            self.add_mode(mode.name, partial(mode.open, self))
        self._leaving = False

    def on_mount(self) -> None:
        """Take up the choices of the last run."""
        # The shell has written over the screen while the workbench was suspended.
        self.app_resume_signal.subscribe(self, lambda _: self.refresh(layout=True))
        if colours(os.environ) == 0:
            self.notify(
                f"TERM={os.environ.get('TERM', '')}: shown without colours; set TERM to the name "
                "of a terminal that has some, such as xterm-256color",
                title="This terminal has no colours",
                severity="warning",
                markup=False,
            )
        try:
            theme = preferences.load().theme
        except (OSError, ValueError) as error:
            self.notify(
                f"{preferences.preferences_file()}: {error}",
                title="Your choices cannot be read",
                severity="warning",
                markup=False,
            )
            return
        if theme in self.available_themes:
            self.theme = theme

    def on_ready(self) -> None:
        """The first frame is out: now the engine."""
        self.run_worker(self._launch(), group="engine")

    # --- the engine ------------------------------------------------------------------------

    async def _launch(self) -> None:
        await asyncio.gather(self.session.start(), asyncio.to_thread(self._load_the_rest))
        error = self.session.error
        if error is not None and error.exit_code == ExitCode.BAD_INPUT:
            # Nothing that could be done from in here: another flag, file or model is needed.
            await self.leave(error.exit_code)

    def _load_the_rest(self) -> None:
        """Import what the first answer needs, which the first paint does without.

        All that is there then stays to the end: the garbage collector need not look at it again
        and again, which takes a quarter of a second each time, in the middle of an answer.
        """
        importlib.import_module("tui.widgets.turn")
        if not self.is_headless:  # so that this process is the workbench's alone
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)

    @on(EngineChanged)
    def _engine_changed(self, message: EngineChanged) -> None:
        for screen in self.main_screens():
            screen.snapshot = message.snapshot

    @on(EngineNotice)
    def _engine_notice(self, message: EngineNotice) -> None:
        self.notify(message.text, markup=False)

    # --- the modes -------------------------------------------------------------------------

    @property
    def chat(self) -> ChatScreen:
        """The chat, which is always there."""
        return cast("ChatScreen", self._screen_stacks["chat"][0])

    def main_screens(self) -> list[ShowsEngine]:
        """The main screens that were opened so far."""
        opened = [stack[0] for stack in self._screen_stacks.values() if stack]
        return cast(list[ShowsEngine], opened)

    def action_open_mode(self, name: str) -> None:
        """Show a main screen; it is made when it is opened for the first time."""
        self.switch_mode(name)

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
        """Quit and stop the engine, unless a screen has something that holds the user."""
        self.run_worker(self._quit(), group="leave")

    async def _quit(self) -> None:
        for screen in self.main_screens():
            if isinstance(screen, AsksBeforeLeaving) and not await screen.may_leave():
                return
        await self.leave(ExitCode.OK)

    async def action_copy_or_quit(self) -> None:
        """Ctrl+C: copy what is selected, else quit."""
        focused = self.screen.focused
        in_prompt = focused.selected_text if isinstance(focused, TextArea) else ""
        selected = in_prompt or self.screen.get_selected_text()
        if selected:
            self.copy_to_clipboard(selected)
            self.notify("Copied")
        else:
            await self.action_quit()

    def _fatal_error(self) -> None:
        """A mistake in the program: one line for the user, the traceback in a file."""
        path = state_dir() / "logs" / "crash.log"
        try:
            write_private(make_private(path.parent) / path.name, traceback.format_exc().encode())
            where = f"details in {path}"
        except OSError as error:
            where = f"details could not be kept: {error}"
        line = f"jupiter-tui: internal error: {self._exception!r}; {where}"
        self._exit_renderables.append(Text(line))
        self._close_messages_no_wait()

    # --- commands --------------------------------------------------------------------------

    def action_help(self) -> None:
        """Show the keys and what the figures mean, for the screen that is shown."""
        from tui.screens.help import HelpScreen

        if not isinstance(self.screen, ModalScreen):
            title = next(mode.title for mode in MODES if mode.name == self.current_mode)
            self.push_screen(HelpScreen(self.screen, title))

    def action_toggle_theme(self) -> None:
        """Change between the light and the dark theme."""
        self.choose_theme(partner(self.current_theme))

    def action_change_theme(self) -> None:
        """Choose one of all themes in the palette."""
        self.search_commands(
            [(name, partial(self.choose_theme, name)) for name in sorted(self.available_themes)],
            placeholder="Which colours?",
        )

    def choose_theme(self, name: str) -> None:
        """Show a theme, and keep the choice for later runs."""
        self.theme = name
        try:
            preferences.save(preferences.Preferences(theme=name))
        except OSError as error:
            self.notify(
                f"The theme holds for this run only: {error}", severity="warning", markup=False
            )

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """What the command palette offers."""
        yield from offers(self, screen)
