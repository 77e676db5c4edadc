"""The main screens: one mode each, one function key each, built when first opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from textual.app import App
from textual.binding import Binding
from textual.screen import Screen

if TYPE_CHECKING:
    from tui.app import JupiterApp
    from tui.snapshot import Snapshot


class ShowsEngine(Protocol):
    """What the app asks of a main screen: take in each new snapshot of the engine."""

    snapshot: Snapshot | None


@runtime_checkable
class AsksBeforeLeaving(Protocol):
    """A main screen that has to ask before the workbench ends."""

    async def may_leave(self) -> bool: ...


@dataclass(frozen=True)
class Mode:
    """One main screen: how it is called, the key that shows it, and how it is made."""

    name: str
    title: str
    key: str
    about: str
    make: Callable[[JupiterApp], Screen[None]]

    @property
    def binding_id(self) -> str:
        """The id under which `keymap` can give the mode another key."""
        return f"app.{self.name}"

    def shown_key(self, app: App[object]) -> str:
        """The key that shows the mode, as the user has it on their keyboard."""
        return key_of(app, self.binding_id, self.key)

    def open(self, app: JupiterApp) -> Screen[None]:
        """The mode's screen, whose id is the mode's name."""
        screen = self.make(app)
        screen.id = self.name
        return screen


def key_of(app: App[object], binding_id: str, default: str) -> str:
    """The (first) key of an action, for people, as the user's keymap has it."""
    key = app._keymap.get(binding_id, default).partition(",")[0]
    return app.get_key_display(Binding(key, ""))


def _chat(app: JupiterApp) -> Screen[None]:
    from tui.screens.chat import ChatScreen

    return ChatScreen(app.session)


def _stages(app: JupiterApp) -> Screen[None]:
    from tui.screens.stages import StagesScreen

    return StagesScreen(app.session, app.speeds, app.config_given)


def _telemetry(app: JupiterApp) -> Screen[None]:
    from tui.screens.telemetry import TelemetryScreen

    return TelemetryScreen(app.session, app.telemetry)


def _training(app: JupiterApp) -> Screen[None]:
    from tui.screens.training import TrainingScreen

    return TrainingScreen(app.session)


MODES = (
    Mode("chat", "Chat", "f2", "Talk with the model", _chat),
    Mode("stages", "Stages", "f3", "Which stage holds which layers", _stages),
    Mode("telemetry", "Telemetry", "f4", "What every stage does right now", _telemetry),
    Mode("training", "Training", "f5", "Train Medusa heads", _training),
)
