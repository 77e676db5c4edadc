"""A training run to look at: where it is, and its course as charts."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import Grid, Vertical
from textual.content import Content
from textual.widgets import Static

from engine.training.progress import span
from tui import metrics
from tui.chart import Series
from tui.text import harmless, short_path
from tui.themes import DIM
from tui.training_history import Evaluation, Point
from tui.training_run import Phase, TrainingRun
from tui.widgets.chart import LineChart

# The colours of the heads are those of their tokens in the chat, but for the fifth: as lines it and
# the third would look alike.
HEADS = ("$text-secondary", "$text-success", "$text-warning", "$text-error", "$foreground 60%")
BASE = "$text-primary"
PHASES: dict[Phase, tuple[str, str]] = {
    "preparing": ("preparing", "$text-warning"),
    "training": ("training", "$text-primary"),
    "stopping": ("stopping: it ends its step and saves a checkpoint", "$text-warning"),
    "finished": ("finished", "$text-success"),
    "stopped": ("stopped", "$text-warning"),
    "failed": ("failed", "$text-error"),
}


class RunView(Vertical):
    """Shows a run; `show` brings it up to date."""

    DEFAULT_CSS = """
    RunView {
        #run-head { height: auto; padding: 0 1; }
        #charts { grid-size: 6 2; grid-gutter: 0 1; height: 1fr; min-height: 12; }
        #loss, #accuracy { column-span: 3; }
        #rate, #speed, #memory { column-span: 2; }
    }
    """

    def compose(self) -> ComposeResult:
        """The run in words, the charts below."""
        yield Static(id="run-head")
        with Grid(id="charts"):
            yield LineChart("loss per head", _plain, from_zero=False, id="loss")
            yield LineChart("top-1 accuracy per head", _percent, id="accuracy")
            yield LineChart("learning rate", _power, id="rate")
            yield LineChart("tokens/s", _short, id="speed")
            yield LineChart("memory", _gib, id="memory")

    def show(self, run: TrainingRun) -> None:
        """Draw the run as it is now."""
        history = run.history
        self.query_one("#run-head", Static).update(head(run, self.size.width - 2))
        points = history.points
        on_device = bool(points) and points[-1].memory_kind == "device"
        self._chart("#loss").show(_losses(points))
        self._chart("#accuracy").show(_accuracies(points))
        self._chart("#rate").show(_one([(p.iteration, p.lr) for p in points]))
        speed = [(p.iteration, p.tokens_per_s) for p in points if p.tokens_per_s is not None]
        self._chart("#speed").show(_one(speed))
        self._chart("#memory").show(
            _one([(p.iteration, p.memory_bytes / 2**30) for p in points]),
            "rank 0, peak on device" if on_device else "rank 0 memory",
        )

    def _chart(self, name: str) -> LineChart:
        return self.query_one(name, LineChart)


def head(run: TrainingRun, width: int) -> Content:
    """The run in words: its folder, its state with a bar, its times, the latest evaluation."""
    history = run.history
    name = short_path(run.folder) if run.folder is not None else "its folder is not made yet"
    words, style = PHASES[run.phase]
    known = history.iteration is not None and history.total is not None
    steps = f"step {history.iteration} of {history.total}" if known else "step n/a"
    times = [steps]
    if run.running:
        times.append(f"{_span(history.remaining_s)} left")
    times.append(f"{_span(history.elapsed_s)} so far")
    line = Content.assemble((f"● {words}", style), "  ", " · ".join(times))
    room = max(0, min(40, width - line.cell_length - 2))
    if room >= 8:
        full, empty = metrics.bar(history.iteration or 0, history.total or 0, room)
        line = Content.assemble(line, "  ", (full, "$primary"), (empty, "$foreground 25%"))
    lines = [
        Content.styled(harmless(name), "bold").truncate(width, ellipsis=True),
        line.truncate(width, ellipsis=True),
        Content.styled(_below(run), DIM if not run.problem else "$text-error"),
    ]
    return Content("\n").join(lines)


def _below(run: TrainingRun) -> str:
    if run.problem:
        return harmless(run.problem)
    if run.phase == "preparing":
        return run.said or "the training process is starting"
    found = run.history.evaluations
    return evaluation_text(found[-1] if found else None)


def evaluation_text(found: Evaluation | None) -> str:
    """The latest figures of the rows held out."""
    if found is None:
        return "held-out rows: not evaluated yet"
    if found.accuracy is not None:
        what = f"top-1 {_percent(found.accuracy)}"
    else:
        what = f"top-1 per head {', '.join(map(_percent, found.accuracy_per_head))}"
    return f"held-out rows after step {found.iteration}: {what}"


def _losses(points: Sequence[Point]) -> list[Series]:
    base = [(p.iteration, p.base_loss) for p in points if p.base_loss is not None]
    return [*_per_head(points, "loss_per_head"), *([Series("base", BASE, base)] if base else [])]


def _accuracies(points: Sequence[Point]) -> list[Series]:
    base = [(p.iteration, p.base_accuracy) for p in points if p.base_accuracy is not None]
    heads = _per_head(points, "accuracy_per_head")
    return [*heads, *([Series("base", BASE, base)] if base else [])]


def _per_head(points: Sequence[Point], key: str) -> list[Series]:
    heads = max((len(getattr(point, key)) for point in points), default=0)
    found = []
    for number in range(heads):
        values = [
            (point.iteration, getattr(point, key)[number])
            for point in points
            if number < len(getattr(point, key))
        ]
        found.append(Series(f"{number + 1}:", HEADS[number % len(HEADS)], values))
    return found


def _one(points: list[tuple[int, float]]) -> list[Series]:
    return [Series("", "$text-primary", points)]


def _span(seconds: float | None) -> str:
    return metrics.UNKNOWN if seconds is None else span(seconds)


def _plain(value: float) -> str:
    return f"{value:.3g}" if value >= 100 else f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{value * 100:.0f} %"


def _power(value: float) -> str:
    return f"{value:.2g}".replace("e-0", "e-")


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _gib(value: float) -> str:
    return f"{value:.2f} GiB"
