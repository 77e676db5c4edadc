"""The one-line bars: what runs (on top) and what was measured (below)."""

from __future__ import annotations

from textual import events
from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from tui import metrics
from tui.metrics import Figures
from tui.modes import MODES, key_of
from tui.snapshot import Snapshot
from tui.text import harmless
from tui.themes import DIM

GAP = "  "
NARROW = 100
HERE = "bold underline $primary"


class TitleBar(Widget):
    """The main screens with their keys on the left; what runs, and its state, on the right."""

    DEFAULT_CSS = """
    TitleBar {
        height: 1;
        padding: 0 1;
        background: $panel;
    }
    """

    snapshot: reactive[Snapshot | None] = reactive(None)
    answering: reactive[bool] = reactive(False)

    def __init__(self) -> None:
        super().__init__()
        self._tabs: list[tuple[int, str]] = []
        """The column where each name ends, and the app's action for it."""

    def on_mount(self) -> None:
        """Tell on every screen whether the chat is being answered."""
        chat = getattr(self.app, "chat", None)
        if chat is not None:
            self.watch(chat, "running", self._chat_runs)

    def _chat_runs(self, running: object) -> None:
        self.answering = running is not None

    def render(self) -> Content:
        """One line as wide as the terminal; what does not fit of the facts is cut."""
        width = self.content_size.width
        left = self._modes("Jupiter  " if width >= NARROW else "")
        state, style = self._state(self.snapshot)
        right = Content.styled(f"● {state}", style)
        room = width - left.cell_length - right.cell_length - 2
        facts = Content.styled(self._facts(room), DIM)
        return Content.assemble(
            left, " ", facts.truncate(max(0, room), ellipsis=True, pad=True), " ", right
        )

    async def on_click(self, event: events.Click) -> None:
        """Show the screen whose name was clicked, or the help."""
        column = event.get_content_offset_capture(self).x
        for end, action in self._tabs:
            if column < end:
                await self.run_action(f"app.{action}")
                return

    def _modes(self, brand: str) -> Content:
        shown = Content.styled(brand, "bold $primary")
        self._tabs.clear()
        help_key = key_of(self.app, "app.help", "f1")
        tabs = [(help_key, "Help", "help")]
        tabs += [
            (mode.shown_key(self.app), mode.title, f"open_mode('{mode.name}')") for mode in MODES
        ]
        for key, title, action in tabs:
            here = f"'{self.screen.id}'" in action
            shown = Content.assemble(shown, (f"{key} ", DIM), (title, HERE if here else ""), " ")
            self._tabs.append((shown.cell_length, action))
        return shown

    def _facts(self, room: int) -> str:
        """Model, number format and device, as much of it as fits in `room` cells."""
        if self.snapshot is None:
            return ""
        model = harmless(self.snapshot.model)
        facts = [model, self.snapshot.dtype]
        if self.snapshot.ready is not None:
            facts.append(self.snapshot.ready.device)
        whole = " · ".join(facts)
        return whole if len(whole) <= room else model

    def _state(self, snapshot: Snapshot | None) -> tuple[str, str]:
        match snapshot.phase if snapshot is not None else "starting":
            case "starting":
                return "starting", "$text-warning"
            case "recovering":
                return "recovering", "$text-warning"
            case "applying":
                return "applying", "$text-warning"
            case "stopping":
                return "stopping the engine", "$text-warning"
            case "failed":
                return "engine stopped", "$text-error"
        return ("answering", "$text-primary") if self.answering else ("ready", "$text-success")


class StatusLine(Widget):
    """The measured figures of the latest answer, and the split; "n/a" where none is known."""

    figures: reactive[Figures] = reactive(Figures())
    split: reactive[tuple[int, ...]] = reactive(())

    def render(self) -> Content:
        """As many figures as fit, the most telling first."""
        shown = Content("")
        for label, value in status_parts(self.figures, self.split):
            part = Content.assemble((label, DIM), value)
            if shown.cell_length + len(GAP) + part.cell_length > self.content_size.width:
                break
            shown = Content.assemble(shown, GAP if shown.cell_length else "", part)
        return shown


def status_parts(figures: Figures, split: tuple[int, ...]) -> list[tuple[str, str]]:
    """The figures as (label, value), the most telling first."""
    return [
        ("first token ", metrics.seconds(figures.ttft_s)),
        ("", metrics.rate(figures.tokens_per_s)),
        ("", metrics.per_step(figures.tokens_per_step)),
        ("", metrics.split(split)),
        ("", metrics.prefill(figures)),
        ("answer ", f"{metrics.count(figures.completion_tokens)} tokens"),
    ]
