"""The training runs there have been, one line each; Enter opens one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from tui.run_folders import RunFolder, Status
from tui.snapshot import short_name
from tui.text import harmless
from tui.themes import DIM

STATUS: dict[Status, tuple[str, str]] = {
    "running": ("running", "$text-primary"),
    "finished": ("finished", "$text-success"),
    "stopped": ("stopped", "$text-warning"),
    "ended": ("ended without a checkpoint", "$text-error"),
}
NOTHING = "No runs yet."


class RunList(OptionList):
    """`show` fills it; an option's id is the run's folder."""

    DEFAULT_CSS = """
    RunList {
        height: 1fr;
        border: none;
        padding: 1 1 0 1;
        background: $background;
        &:focus { border: none; background-tint: $foreground 0%; }
        & > .option-list--option-highlighted { background: $panel; color: $foreground; }
        &:focus > .option-list--option-highlighted { background: $primary 25%; color: $foreground; }
        &:ansi > .option-list--option-highlighted, &:ansi:focus > .option-list--option-highlighted {
            background: ansi_default;
            color: ansi_default;
            text-style: reverse;
        }
    }
    """

    def show(self, runs: Sequence[RunFolder]) -> None:
        """These runs, the latest first; the highlight stays on its run."""
        before = self.highlighted_option
        self.clear_options()
        if not runs:
            self.add_option(Option(NOTHING, disabled=True))
            return
        self.add_options([Option(line(run), id=str(run.path)) for run in runs])
        kept = before.id if before is not None else None
        names = [str(run.path) for run in runs]
        self.highlighted = names.index(kept) if kept in names else 0


def line(run: RunFolder) -> Content:
    """What a run was, and where it is."""
    word, style = STATUS[run.status]
    if run.status == "stopped":
        word = f"stopped after step {run.checkpoint}"
    data: Any = run.args.get("dataset") or []
    names = ", ".join(Path(str(name)).name for name in data) if isinstance(data, list) else ""
    model = short_name(str(run.args.get("model") or "the config's model"))
    what = f"{run.args.get('medusa_objective', '')} · {model} · {names}"
    return Content.assemble(
        (harmless(run.path.name), "bold"), "  ", (word, style), "  ", (harmless(what), DIM)
    )
