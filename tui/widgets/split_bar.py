"""The whole model as one bar: a part per stage, with boundaries to drag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from textual import events
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

from tui.stage_draft import StageDraft
from tui.themes import DIM

GRIP = "┃"
LIVE_EDGE = "╵"

CHOSEN = "bold $block-cursor-foreground on $block-cursor-background"


class SplitBar(Widget):
    """Draws a draft to scale. Click a stage to choose it, drag a boundary to move it."""

    DEFAULT_CSS: ClassVar[str] = """
    SplitBar { height: 3; width: 1fr; padding: 0 1; }
    """

    draft: reactive[StageDraft | None] = reactive(None)

    @dataclass
    class Moved(Message):
        """A boundary was dragged to where `to` layers are before it."""

        boundary: int
        to: int

    @dataclass
    class Chosen(Message):
        """A stage was clicked."""

        stage: int

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._dragged: int | None = None

    def render(self) -> Content:
        """Two lines of stages, and below them where the live boundaries are."""
        draft, width = self.draft, self.content_size.width
        if draft is None or width < 1:
            return Content("")
        edges = [0, *cells(draft.boundaries, draft.layers, width), width]
        names, counts = [], []
        for stage, (left, right) in enumerate(pairwise(edges)):
            last = stage == len(draft.split) - 1
            room = right - left - (0 if last else 1)
            style = CHOSEN if stage == draft.chosen else "on $panel"
            mark = "▸" if stage == draft.chosen else " "
            layers = draft.split[stage]
            names += [(_fit(room, f"{mark}stage {stage}", f"{mark}{stage}"), style)]
            counts += [(_fit(room, f" {layers} layers", f" {layers}", f"{layers}"), style)]
            if not last:
                grip = "$accent" if self._dragged == stage else "$foreground 60%"
                names.append((GRIP, grip))
                counts.append((GRIP, grip))
        below = self._live_line(draft, width)
        return Content.assemble(*names, "\n", *counts, "\n", (below, DIM))

    def _live_line(self, draft: StageDraft, width: int) -> str:
        if not draft.changed:
            return ""
        line = [" "] * width
        live = [sum(draft.live[: i + 1]) for i in range(len(draft.live) - 1)]
        for edge in cells(live, draft.layers, width):
            line[edge - 1] = LIVE_EDGE
        text = "".join(line)
        label = "live " + "|".join(map(str, draft.live)) + " "
        return label + text[len(label) :] if not text[: len(label)].strip() else text

    # --- the mouse -------------------------------------------------------------------------

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Take a boundary, or choose the stage that was clicked."""
        draft, x = self.draft, event.x - self.styles.padding.left
        if draft is None:
            return
        edges = cells(draft.boundaries, draft.layers, self.content_size.width)
        near = [i for i, edge in enumerate(edges) if abs(edge - 1 - x) <= 1]
        if near:
            self._dragged = min(near, key=lambda i: abs(edges[i] - 1 - x))
            self.capture_mouse()
            self.refresh()
        else:
            self.post_message(self.Chosen(sum(edge <= x for edge in edges)))
        event.stop()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Move the boundary that is held to the layer under the pointer."""
        draft, width = self.draft, self.content_size.width
        if self._dragged is None or draft is None or width < 1:
            return
        x = event.x - self.styles.padding.left
        to = round((x + 1) * draft.layers / width)
        if to != draft.boundaries[self._dragged]:
            self.post_message(self.Moved(self._dragged, to))
        event.stop()

    def on_mouse_up(self, event: events.MouseUp) -> None:
        """Let go."""
        if self._dragged is not None:
            self._dragged = None
            self.release_mouse()
            self.refresh()
            event.stop()

    def watch_draft(self, draft: StageDraft | None) -> None:
        """A boundary that is gone cannot be held any longer."""
        if self._dragged is not None and draft and self._dragged >= len(draft.split) - 1:
            self._dragged = None
            self.release_mouse()


def cells(boundaries: Sequence[int], layers: int, width: int) -> list[int]:
    """The cell behind each boundary of a bar of `width` cells; each stage has at least one."""
    found: list[int] = []
    for index, boundary in enumerate(boundaries):
        lowest = found[-1] + 1 if found else 1
        highest = width - (len(boundaries) - index)
        found.append(max(min(round(boundary * width / layers), highest), lowest))
    return found


def _fit(room: int, *texts: str) -> str:
    """The first of `texts` that fits, padded to the room."""
    text = next((text for text in texts if len(text) <= room), "")
    return text.ljust(max(room, 0))
