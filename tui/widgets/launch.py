"""The start of the engine: each stage's progress, then one quiet line when it is ready."""

from __future__ import annotations

import time

from textual.content import Content
from textual.timer import Timer
from textual.widgets import Static

from engine.protocol import StageState
from tui import metrics
from tui.snapshot import Snapshot
from tui.text import harmless, process
from tui.themes import DIM

TICK_S = 0.1
NARROW = 90
MAX_BAR = 40


class LaunchCard(Static):
    """One launch of the engine. It follows the snapshots that `show` is given."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__()
        self._snapshot = snapshot
        self._ticking: Timer | None = None

    def on_mount(self) -> None:
        """Show elapsed time while the engine starts."""
        self._ticking = self.set_interval(TICK_S, self._draw, pause=self._settled)
        self._draw()

    def on_resize(self) -> None:
        """Fit the bars to the new width."""
        self._draw()

    def show(self, snapshot: Snapshot) -> None:
        """Show a newer snapshot of the same launch."""
        was_settled = self._settled
        self._snapshot = snapshot
        if self._settled and not was_settled and self._ticking is not None:
            self._ticking.pause()
        self.set_class(snapshot.ready is not None, "-ready")
        self._draw()

    @property
    def _settled(self) -> bool:
        return self._snapshot.phase != "starting"

    def _draw(self) -> None:
        if self._snapshot.ready is not None:
            self.update(ready_line(self._snapshot))
        else:
            width = self.content_size.width or self.app.size.width - 8
            self.update(progress(self._snapshot, width, time.monotonic()))


def ready_line(snapshot: Snapshot) -> Content:
    """One line about a launch that succeeded."""
    ready = snapshot.ready
    assert ready is not None
    tree = "tuned tree" if ready.tree_tuned else f"tree of {ready.tree_size}"
    heads = f"{ready.medusa_num_heads} heads, {tree}" if ready.medusa_num_heads else "no heads"
    facts = [
        f"ready in {metrics.seconds(snapshot.ready_after_s)}",
        f"{len(ready.stages)} stage{'s' if len(ready.stages) > 1 else ''}",
        f"context {metrics.count(ready.context_length)}",
        heads,
    ]
    return Content.assemble((harmless(ready.model), "bold"), "  ", (" · ".join(facts), DIM))


def progress(snapshot: Snapshot, width: int, now: float) -> Content:
    """The stages of a launch that is under way (or was when it failed), one line each."""
    count = len(snapshot.split)
    head = [
        (harmless(snapshot.model), "bold"),
        (f" on {count} stage{'s' if count > 1 else ''}" if count else "", DIM),
    ]
    if snapshot.phase == "starting" and snapshot.began_at is not None:
        head.append((f"  {now - snapshot.began_at:.1f} s", DIM))
    parts: list[str | Content | tuple[str, str]] = [*head]
    if snapshot.phase == "starting":
        doing = snapshot.detail or "starting the engine"
        parts += ["\n", (harmless(doing).replace("\n", " "), DIM)]
    parts.append("\n")
    for rank, layers in enumerate(snapshot.split):
        state = snapshot.stages.get(rank)
        parts += ["\n", _stage_line(rank, snapshot.first_layer(rank), layers, state, width)]
    return Content.assemble(*parts)


def _stage_line(
    rank: int, first: int, layers: int, state: StageState | None, width: int
) -> Content:
    name = f"stage {rank}  layers {metrics.layer_range(first, layers):<7}"
    phase = "waiting" if state is None else state.phase
    loaded = ""
    if state is not None and state.total:
        loaded = f"{state.done}/{state.total} tensors"
    where = process(state.pid, state.node) if state is not None and state.pid else ""
    pid = f"  {where}" if where and width >= NARROW else ""
    tail = f"  {loaded:<15}  {phase:<10}{pid}"
    room = max(0, min(MAX_BAR, width - len(name) - len(tail) - 2))
    done, total = (state.done, state.total) if state is not None else (0, 0)
    if phase == "ready":
        done, total = 1, 1
    filled, empty = metrics.bar(done, total, room)
    return Content.assemble(
        name,
        "  ",
        (filled, "$success" if phase == "ready" else "$primary"),
        (empty, "$foreground 25%"),
        (f"  {loaded:<15}", DIM),
        (f"  {phase:<10}", "$text-success" if phase == "ready" else ""),
        (pid, DIM),
    )
