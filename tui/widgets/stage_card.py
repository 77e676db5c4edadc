"""One stage's figures: where it runs, its memory, what its time goes into, how fast it is."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message
from textual.widgets import Static

from tui import metrics
from tui.metrics import UNKNOWN
from tui.sparks import parts, spark
from tui.telemetry import StageView
from tui.text import harmless, process
from tui.themes import DIM

MEMORY_WARNING = 0.75
MEMORY_ERROR = 0.90
# With one question at a time, four stages wait three quarters of the time: nothing is wrong.
WAIT_WARNING = 0.85
LINK_WARNING = 0.10
LINK_ERROR = 0.25
MIB, GIB = 1 << 20, 1 << 30
MEMORY_KINDS = {"process": "process memory", "device": "device memory"}
# The signs differ, so that the bar can be read without colours.
ACTIVITIES = (
    ("busy", "busy", "█", "$primary"),
    ("link", "link", "▓", "$secondary"),
    ("wait", "waiting", "▒", "$foreground 50%"),
    ("idle", "idle", "·", "$foreground 30%"),
)
NARROW = 100
Part = tuple[str, str]


class StageCard(Static, can_focus=True):
    """The figures of one stage, live; Enter or a click on "log" asks for its log."""

    DEFAULT_CSS = """
    StageCard {
        height: auto;
        width: 1fr;
        padding: 0 1;
        margin: 0 0 1 0;
        border-left: outer $panel;

        &:focus { border-left: outer $primary; background: $surface; }
        &.-lost { border-left: outer $error; }
        &.-stale { border-left: outer $warning; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,l", "open_log", "Log", id="telemetry.log", tooltip="What this stage prints")
    ]

    class LogWanted(Message):
        """The user wants to see the log of a stage."""

        def __init__(self, rank: int) -> None:
            self.rank = rank
            super().__init__()

    def __init__(self, stage: StageView) -> None:
        super().__init__()
        self.rank = stage.rank
        self._stage = stage

    def show(self, stage: StageView) -> None:
        """Show newer figures of the same stage."""
        self._stage = stage
        self.set_class(stage.contact == "stale", "-stale")
        self.set_class(stage.contact == "disconnected", "-lost")
        self._draw()

    def on_resize(self) -> None:
        """Fit the bars to the new width."""
        self._draw()

    def _draw(self) -> None:
        self.update(card(self._stage, self.content_size.width or self.app.size.width - 4))

    def action_open_log(self) -> None:
        """Ask for the stage's log."""
        self.post_message(self.LogWanted(self.rank))

    def on_click(self, event: events.Click) -> None:
        """The word "log" is a link."""
        at = event.get_content_offset(self)
        if at is not None and at.y == 0 and at.x >= self.content_size.width - len(LOG):
            self.action_open_log()


LOG = "log ↗"


def card(stage: StageView, width: int) -> Content:
    """The lines of a card `width` cells wide; as much of each as fits."""
    lines = [_head(stage, width), _memory(stage, width), _time(stage, width), _speed(stage, width)]
    return Content("\n").join(lines)


def _head(stage: StageView, width: int) -> Content:
    layers = ""
    if stage.first_layer is not None and stage.layers:
        layers = f"  layers {metrics.layer_range(stage.first_layer, stage.layers)}"
    where = ""
    if stage.sample is not None and stage.sample.device:
        where = f"  {harmless(stage.sample.device)} · {harmless(stage.sample.device_name)}"
    contact, style = _contact(stage)
    pid = f"  {process(stage.pid, stage.node)}" if stage.pid and width >= NARROW else ""
    right = Content.assemble((contact, style), (pid, DIM), " ", (LOG, "$text-accent underline"))
    left = Content.assemble((f"stage {stage.rank}", "bold"), layers, (where, DIM))
    room = max(0, width - right.cell_length - 1)
    return Content.assemble(left.truncate(room, ellipsis=True, pad=True), " ", right)


def _contact(stage: StageView) -> Part:
    age = "" if stage.age_s is None else metrics.seconds(stage.age_s)
    match stage.contact:
        case "live":
            return f"{stage.phase} · {age} ago", "$text-success" if stage.phase == "ready" else ""
        case "stale":
            return f"stale: last heard {age} ago", "$text-warning"
        case "disconnected":
            return "disconnected", "$text-error"
    return stage.phase, DIM


def _memory(stage: StageView, width: int) -> Content:
    sample, share = stage.sample, stage.memory_share
    if sample is None:
        return _row("memory", Content(UNKNOWN), "", width)
    held = f"{size(sample.memory_bytes)} of {size(sample.memory_total_bytes)}"
    percent = f" ({share:.0%})" if share is not None and width >= NARROW else ""
    cache = "KV cache" if width >= NARROW else "KV"
    of_it = f"weights {size(sample.weights_bytes)}  {cache} {size(sample.kv_bytes)}"
    room = _bar_room(width)
    filled, empty = metrics.bar(round(1000 * (share or 0)), 1000, room)
    style = _dim(stage) or memory_style(share)
    bar = Content.assemble((filled, style), (empty, "$foreground 25%"))
    figures = Content.assemble((held + percent, style), (f"  {of_it}", DIM))
    return _row(MEMORY_KINDS[sample.memory_kind], bar, figures, width)


def _time(stage: StageView, width: int) -> Content:
    shares = stage.shares
    if shares is None:
        return _row("time", Content(UNKNOWN), "", width)
    values = [getattr(shares, name) for name, *_ in ACTIVITIES]
    cells = parts(values, _bar_room(width))
    bar = Content.assemble(
        *(
            (sign * count, style)
            for (_, _, sign, style), count in zip(ACTIVITIES, cells, strict=True)
        )
    )
    figures: list[str | Part] = []
    for (name, label, sign, style), value in zip(ACTIVITIES, values, strict=True):
        gap = "  " if figures else ""
        figures += [(f"{gap}{sign} ", style), (f"{label} {value:.0%}", share_style(name, value))]
    return _row("time", bar, Content.assemble(*figures), width)


def _speed(stage: StageView, width: int) -> Content:
    past = spark([shares.busy for shares in stage.past], _bar_room(width))
    step = f"{stage.decode_step_ms:.1f} ms" if stage.decode_step_ms is not None else UNKNOWN
    prefill = metrics.rate(stage.prefill_tokens_per_s)
    link = f"{stage.link_step_ms:.2f} ms" if stage.link_step_ms is not None else UNKNOWN
    if width >= NARROW and stage.sample is not None and stage.link_step_bytes is not None:
        link += f", {stage.link_step_bytes / 1024:.1f} KiB {harmless(stage.sample.link_dtype)}"
    figures = Content.styled(f"{step}/step  link {link}  prefill {prefill}", _dim(stage))
    return _row("busy so far", Content.styled(past, _dim(stage) or "$primary"), figures, width)


def _row(label: str, drawing: Content, figures: str | Content, width: int) -> Content:
    """Label, drawing and figures in columns that are the same in every line."""
    drawn = drawing.truncate(_bar_room(width), pad=True)
    line = Content.assemble((f"{label:<14} ", DIM), drawn, "  ", figures)
    return line.truncate(width, ellipsis=True)


def _bar_room(width: int) -> int:
    """Cells for a bar: what the label and the longest figures leave."""
    return max(6, min(60, width - (68 if width < NARROW else 84)))


def _dim(stage: StageView) -> str:
    """The style of figures that are no longer those of this moment."""
    return "" if stage.contact == "live" else DIM


def memory_style(share: float | None) -> str:
    """The colour of a share of the memory there is."""
    if share is None or share < MEMORY_WARNING:
        return "$success"
    return "$text-warning" if share < MEMORY_ERROR else "$text-error"


def share_style(activity: str, share: float) -> str:
    """The colour of a share of a stage's time."""
    if activity == "wait" and share >= WAIT_WARNING:
        return "$text-warning"
    if activity == "link" and share >= LINK_WARNING:
        return "$text-warning" if share < LINK_ERROR else "$text-error"
    return ""


def size(value: int | None) -> str:
    """Bytes for people: `412 MiB`, `1.32 GiB`, `23.4 GiB`."""
    if value is None:
        return UNKNOWN
    if value < 1000 * MIB:
        return f"{value / MIB:.0f} MiB" if value >= 10 * MIB else f"{value / MIB:.2f} MiB"
    return f"{value / GIB:.2f} GiB" if value < 10 * GIB else f"{value / GIB:.1f} GiB"
