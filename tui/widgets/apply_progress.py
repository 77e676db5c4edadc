"""What a change of the engine is busy with, how long each part took, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual.content import Content
from textual.timer import Timer
from textual.widgets import Static

from engine.protocol import StageState
from tui import metrics
from tui.snapshot import Snapshot
from tui.text import log_text
from tui.themes import DIM

TICK_S = 0.1
SHOWN = 3
"""Parts of a running change that are shown, the latest last."""


@dataclass
class Part:
    """One thing that the change does; seconds of a monotonic clock."""

    doing: str
    began_at: float
    ended_at: float | None = None


class ApplyProgress(Static):
    """A line for each part of the change under way; one line about the last change after it."""

    DEFAULT_CSS: ClassVar[str] = """
    ApplyProgress { height: auto; max-height: 4; padding: 0 2; }
    """

    def __init__(self, hint: str, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._hint = hint
        self._parts: list[Part] = []
        self._stages: Sequence[StageState] = ()
        self._outcome: Content | None = None
        self._ticking: Timer | None = None

    def on_mount(self) -> None:
        """Show elapsed time while a change runs."""
        self._ticking = self.set_interval(TICK_S, self._draw, pause=True)
        self._draw()

    def begin(self) -> None:
        """A change begins."""
        self._parts, self._outcome = [], None
        if self._ticking is not None:
            self._ticking.resume()

    def follow(self, snapshot: Snapshot) -> None:
        """Take in how far the change is."""
        now = time.monotonic()
        if not self._parts or self._parts[-1].doing != snapshot.detail:
            self._close(now)
            self._parts.append(Part(snapshot.detail, now))
        self._stages = [state for _, state in sorted(snapshot.stages.items())]
        self._draw()

    def end(self, text: str, *, failed: bool) -> None:
        """The change is over; `text` says in one line what runs now."""
        now = time.monotonic()
        self._close(now)
        took = f" in {metrics.seconds(now - self._parts[0].began_at)}" if self._parts else ""
        sign, style = ("✗ ", "$text-error") if failed else ("✓ ", "$text-success")
        self._outcome = Content.assemble(
            (sign, style), (log_text(text).replace("\n", " "), style), "" if failed else (took, DIM)
        )
        self._stop()

    def clear(self) -> None:
        """Show the hint again."""
        self._parts, self._outcome = [], None
        self._stop()

    def _stop(self) -> None:
        if self._ticking is not None:
            self._ticking.pause()
        self._draw()

    def _close(self, now: float) -> None:
        if self._parts and self._parts[-1].ended_at is None:
            self._parts[-1].ended_at = now

    def _draw(self) -> None:
        if self._outcome is not None:
            self.update(self._outcome)
        elif self._parts:
            now = time.monotonic()
            lines = [part_line(part, now, self._stages) for part in self._parts[-SHOWN:]]
            self.update(Content("\n").join(lines))
        else:
            self.update(Content.styled(self._hint, DIM))


def part_line(part: Part, now: float, stages: Sequence[StageState]) -> Content:
    """One part: a sign whether it is done, what it is, its time, and stages that are loading."""
    done = part.ended_at is not None
    took = (part.ended_at if part.ended_at is not None else now) - part.began_at
    loading = ""
    if not done:
        loading = "  " + " ".join(_stage_word(state) for state in stages)
    return Content.assemble(
        ("✓ " if done else "● ", "$text-success" if done else "$text-warning"),
        log_text(part.doing).replace("\n", " "),
        (f"  {took:.1f} s", DIM),
        (loading, DIM),
    )


def _stage_word(state: StageState) -> str:
    if state.phase == "loading" and state.total:
        return f"{100 * state.done // state.total}%"
    return state.phase
