"""The columns of the stage editor: a stage, what it holds, what it needs and what it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from textual.containers import HorizontalScroll
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

from tui import metrics
from tui.stage_view import Card, Figure, Tone, share_tone
from tui.themes import DIM

STYLES: dict[Tone, str] = {
    "": "",
    "better": "$text-success",
    "worse": "$text-warning",
    "warning": "$text-warning",
    "error": "$text-error",
}
NARROWEST, WIDEST = 25, 44
CHANGE_COLUMN = 11
"""Cells of the column of changes, where there is room for one."""


class DraftCard(Widget):
    """Draws one stage of the draft; a click chooses it."""

    DEFAULT_CSS: ClassVar[str] = """
    DraftCard {
        height: auto;
        border: round $foreground 25%;
        border-title-color: $foreground;
        border-subtitle-color: $foreground 60%;
    }
    DraftCard.-chosen { border: round $primary; border-title-color: $primary; }
    """

    card: reactive[Card | None] = reactive(None, layout=True)

    @dataclass
    class Chosen(Message):
        """This stage was clicked."""

        stage: int

    def watch_card(self, card: Card | None) -> None:
        """Name the stage and its device on the border."""
        if card is not None:
            self.border_title = f"stage {card.rank}" + (" · new" if card.is_new else "")
            self.border_subtitle = card.device or metrics.UNKNOWN

    def on_click(self) -> None:
        """Choose the stage."""
        if self.card is not None:
            self.post_message(self.Chosen(self.card.rank))

    def render(self) -> Content:
        """Layers, parts, figures, and the share of the device."""
        # Wider than this, the eye would not find from a label to its figure.
        card, width = self.card, min(self.content_size.width, WIDEST)
        if card is None or width < 1:
            return Content("")
        changed = any(figure.change for figure in card.figures)
        lines = [
            _layers(card),
            Content.styled(" · ".join(card.holds) or "layers only", DIM),
            *(_line(figure, width, changed) for figure in card.figures),
            _share(card, width),
        ]
        return Content("\n").join(line.truncate(width, ellipsis=True) for line in lines)


class DraftCards(HorizontalScroll, can_focus=False):
    """The columns side by side; where not all fit, the chosen one is scrolled to."""

    DEFAULT_CSS: ClassVar[str] = """
    DraftCards {
        height: auto;
        padding: 0 1;
        scrollbar-size-horizontal: 1;
        scrollbar-color: $foreground 20%;
        scrollbar-color-hover: $foreground 40%;
        scrollbar-color-active: $primary;
        scrollbar-background: $background;
        scrollbar-background-hover: $background;
        scrollbar-background-active: $background;
    }
    """

    def on_resize(self) -> None:
        """Share the width among the columns."""
        self._share_width()

    async def show(self, cards: list[Card], chosen: int) -> None:
        """Draw `cards`, with as many columns."""
        columns = list(self.query(DraftCard))
        for column in columns[len(cards) :]:
            await column.remove()
        if len(columns) < len(cards):
            await self.mount_all(DraftCard() for _ in cards[len(columns) :])
        for column, card in zip(self.query(DraftCard), cards, strict=True):
            column.card = card
            column.set_class(card.rank == chosen, "-chosen")
            if card.rank == chosen:
                self.call_after_refresh(self.scroll_to_widget, column, animate=False)
        self._share_width()

    def _share_width(self) -> None:
        columns = self.query(DraftCard)
        for column in columns:
            column.styles.width = max(NARROWEST, self.content_size.width // len(columns))


def _layers(card: Card) -> Content:
    span = metrics.layer_range(card.first_layer, card.num_layers)
    count = f"{card.num_layers} layer{'s' if card.num_layers > 1 else ''}"
    moved = "" if card.is_new or not card.change else f"  {card.change:+d}".replace("-", "−")
    return Content.assemble((count, "bold"), (f"  {span}", DIM), (moved, "$text-accent"))


def _line(figure: Figure, width: int, changed: bool) -> Content:
    column = CHANGE_COLUMN if changed and width >= 24 + CHANGE_COLUMN else 0
    change = figure.change.rjust(column) if column else ""
    room = width - len(change) - len(figure.label)
    return Content.assemble(
        (figure.label, DIM),
        figure.value.rjust(max(room, len(figure.value) + 1)),
        (change, STYLES[figure.tone]),
    )


def _share(card: Card, width: int) -> Content:
    """How full the device is, all stages there together."""
    if card.share is None:
        return Content.styled(f"device memory {metrics.UNKNOWN}", DIM)
    text = f" {card.share:.1%} {card.room}"
    filled, empty = metrics.bar(round(card.share * 1000), 1000, max(0, width - len(text)))
    style = STYLES[share_tone(card.share)]
    return Content.assemble(
        (filled, style or "$primary"), (empty, "$foreground 25%"), (text, style or DIM)
    )
