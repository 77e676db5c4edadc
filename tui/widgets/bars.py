"""The one-line bars: what runs (on top) and what was measured (below)."""

from __future__ import annotations

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from tui import metrics
from tui.metrics import Figures
from tui.snapshot import Snapshot
from tui.text import harmless
from tui.themes import DIM

GAP = "  "


class TitleBar(Widget):
    """Name, model, number format and device on the left; the state on the right."""

    snapshot: reactive[Snapshot | None] = reactive(None)
    answering: reactive[bool] = reactive(False)

    def render(self) -> Content:
        """One line as wide as the terminal."""
        snapshot = self.snapshot
        if snapshot is None:
            return Content("Jupiter")
        facts = [harmless(snapshot.model), snapshot.dtype]
        if snapshot.ready is not None:
            facts.append(snapshot.ready.device)
        state, style = self._state(snapshot)
        left = Content.assemble(("Jupiter", "bold $primary"), GAP, " · ".join(facts))
        right = Content.styled(f"● {state}", style)
        room = self.content_size.width - right.cell_length - 1
        return Content.assemble(left.truncate(room, ellipsis=True, pad=True), " ", right)

    def _state(self, snapshot: Snapshot) -> tuple[str, str]:
        match snapshot.phase:
            case "starting":
                return "starting", "$text-warning"
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
