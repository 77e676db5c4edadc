"""What every stage does right now, and how fast answers come."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.reactive import reactive
from textual.screen import Screen
from textual.widgets import Footer, Static

from engine.protocol import TELEMETRY_INTERVAL_S
from tui import metrics
from tui.snapshot import Snapshot
from tui.telemetry import BUCKET_S, REQUESTS_KEPT, STALE_S, TelemetryStore, TelemetryView
from tui.text import harmless
from tui.themes import DIM
from tui.widgets import stage_card
from tui.widgets.bars import TitleBar
from tui.widgets.history import History
from tui.widgets.stage_card import StageCard
from tui.widgets.timeline import TimelineView

if TYPE_CHECKING:
    from tui.session import EngineSession

SHORTEST_S, LONGEST_S = 0.0625, 8.0
"""What the timeline shows at least and at most."""
WIDE = 180
"""From so many columns on, the cards are in two columns."""
STATE_STYLES = {
    "ready": "$text-success",
    "busy": "$text-primary",
    "dead": "$text-error",
}


class TelemetryScreen(Screen[None]):
    """Draws what the store has, twice a second while it is shown; a pause freezes only that."""

    HELP: ClassVar[str] = f"""
    ## What is shown
    Every figure is measured by the stages themselves, every {TELEMETRY_INTERVAL_S:g} s; `n/a` is
    what nobody has measured yet.

    - **tokens/s**: all answers together, in spans of {BUCKET_S:g} s; the number is that of the
      last {metrics.seconds(4 * BUCKET_S)}.
    - **first token**: a bar for each answer, from the request's arrival to its first token; the
      median is that of the last {REQUESTS_KEPT} answers.
    - **memory**: on CUDA what this process has allocated on the device, of the device's; on CPU
      the process's resident memory, of what the machine (or its control group) has. Stages on one
      machine share the same total. *KV cache* is its size when full: on CPU unused parts take no
      memory yet.
    - **time**, of the last sample: █ busy (layers, heads; on stage 0 also scheduling and text),
      ▓ link (sending, and receiving what has begun to arrive), ▒ waiting for a neighbour while
      there is work, · idle.
    - **busy so far**: the busy share of earlier samples, the newest on the right.
    - **ms/step**, **link**: computing and link time of one step, as last measured; **prefill**:
      prompt tokens over this stage's computing time.

    ## Timeline
    *t* shows for each stage which micro-batch it computed when: a digit is the point of an
    outline answer, █ another decode step, ▒ prompt tokens, ·
    a bubble, in which the stage had nothing to compute. *in the air* counts the micro-batches
    between the first stage's beginning and the last stage's end. *+* and *-* zoom. Stages on
    several machines are as far apart as their clocks.

    ## Colours
    | figure | yellow | red |
    |---|---|---|
    | memory | from {stage_card.MEMORY_WARNING:.0%} | from {stage_card.MEMORY_ERROR:.0%} |
    | waiting | from {stage_card.WAIT_WARNING:.0%} | |
    | link | from {stage_card.LINK_WARNING:.0%} | from {stage_card.LINK_ERROR:.0%} |
    | stage | stale: not heard for {STALE_S:g} s | disconnected: its process has ended |

    With one question at a time, the stages work in turns: each waits while the others compute.
    A pause freezes the view; the collection goes on.
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space,p", "pause", "Pause", id="telemetry.pause", tooltip="Freeze the view"),
        Binding(
            "t",
            "timeline",
            "Timeline",
            id="telemetry.timeline",
            tooltip="Which stage did what when",
        ),
        Binding("plus,equals_sign", "zoom(0.5)", "Zoom in", show=False, id="telemetry.zoom_in"),
        Binding("minus", "zoom(2)", "Zoom out", show=False, id="telemetry.zoom_out"),
        Binding("up,k", "move(-1)", "Stage above", show=False, id="telemetry.up"),
        Binding("down,j", "move(1)", "Stage below", show=False, id="telemetry.down"),
        Binding(
            "0", "open_log(0)", "Log of stage 0, others by 1 to 9", show=False, id="telemetry.log_0"
        ),
        # Without words of their own, so that the list of keys stays short.
        *(
            Binding(str(n), f"open_log({n})", show=False, id=f"telemetry.log_{n}")
            for n in range(1, 10)
        ),
    ]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (WIDE, "-wide")]  # noqa: RUF012 (as Textual's own)
    VERTICAL_BREAKPOINTS = [(0, "-short"), (30, "-high"), (50, "-tall")]  # noqa: RUF012
    AUTO_FOCUS = "StageCard"
    DEFAULT_CSS = """
    TelemetryScreen {
        #telemetry-summary { height: 1; padding: 0 1; }
        #histories { height: 7; margin: 0 0 1 0; }
        #stages { height: 1fr; scrollbar-size-vertical: 1; }
        &.-high #histories { height: 1fr; min-height: 9; max-height: 16; margin: 1 0; }
        &.-tall #histories { height: 1fr; min-height: 13; max-height: 30; margin: 1 0; }
        &.-high #stages, &.-tall #stages { height: auto; max-height: 60%; }
        &.-wide #stages { layout: grid; grid-size: 2; grid-gutter: 1 2; grid-rows: auto; }
        &.-wide StageCard { margin: 0; }
        #timeline { display: none; }
        #histories.-timeline #timeline { display: block; }
        #histories.-timeline History { display: none; }
    }
    """

    snapshot: reactive[Snapshot | None] = reactive(None, init=False)
    paused: reactive[bool] = reactive(False, init=False)

    def __init__(self, session: EngineSession, telemetry: TelemetryStore) -> None:
        super().__init__()
        self._session = session
        self._store = telemetry
        self._view = telemetry.view(session.snapshot.split)
        self._seconds = 0.5
        self._window = telemetry.timeline.latest(self._seconds)

    def compose(self) -> ComposeResult:
        """Title, one line about the engine, two histories, a card for each stage."""
        yield TitleBar()
        yield Static(id="telemetry-summary")
        with Horizontal(id="histories"):
            yield History("area", _number, seconds=BUCKET_S, id="token-rates")
            yield History("bars", _seconds, style="$secondary", id="first-tokens")
            yield TimelineView(id="timeline")
        yield VerticalScroll(id="stages", can_focus=False)
        yield Footer()

    async def on_mount(self) -> None:
        """Show what is there, and from then on what comes."""
        self.snapshot = self._session.snapshot
        await self._refresh()
        self.set_interval(TELEMETRY_INTERVAL_S, self._tick)

    async def on_screen_resume(self, event: events.ScreenResume) -> None:
        """Shown again: at once with the figures of now."""
        await self._tick()

    def watch_snapshot(self, snapshot: Snapshot) -> None:
        """Show the engine's state on the title bar."""
        self.query_one(TitleBar).snapshot = snapshot

    async def _tick(self) -> None:
        if self.is_current and self.is_mounted:
            await self._refresh()

    async def _refresh(self) -> None:
        split = (self.snapshot or self._session.snapshot).split
        if self.paused:
            self._show_summary(self._store.view(split).at)
            return
        view = self._view = self._store.view(split)
        self._show_timeline()
        self.query_one(TitleBar).answering = view.running > 0
        self._show_summary(view.at)
        self.query_one("#token-rates", History).show(_rate_title(view), view.token_rates)
        self.query_one("#first-tokens", History).show(_ttft_title(view), view.ttfts_s)
        await self._show_stages(view)

    async def _show_stages(self, view: TelemetryView) -> None:
        """A card for each stage; cards are made or taken away when the split has changed."""
        cards = list(self.query(StageCard))
        area = self.query_one("#stages")
        for card in cards[len(view.stages) :]:
            await card.remove()
        new = [StageCard(stage) for stage in view.stages[len(cards) :]]
        if new:
            await area.mount(*new)
        for card, stage in zip(self.query(StageCard), view.stages, strict=True):
            card.show(stage)
        if self.focused is None and view.stages:
            self.query(StageCard).first().focus()

    def _show_summary(self, now: float) -> None:
        self.query_one("#telemetry-summary", Static).update(
            summary(self._view, now - self._view.at if self.paused else None)
        )

    # --- what the keys do ------------------------------------------------------------------

    async def action_pause(self) -> None:
        """Freeze the view, or go on with the figures of now."""
        self.paused = not self.paused
        await self._refresh()

    def action_timeline(self) -> None:
        """Show the timeline of the stages in the place of the histories, or these again."""
        self.query_one("#histories").toggle_class("-timeline")

    def action_zoom(self, by: float) -> None:
        """Show less or more of the timeline."""
        self._seconds = min(max(self._seconds * by, SHORTEST_S), LONGEST_S)
        self._show_timeline()

    def _show_timeline(self) -> None:
        """Up to the latest micro-batch; while the view is paused, up to that of the pause."""
        if not self.paused:
            self._window = self._store.timeline.latest(self._seconds)
        elif self._window.seconds:
            end = self._window.ended
            self._window = self._store.timeline.window(end - self._seconds, end)
        self.query_one(TimelineView).show(self._window)

    def action_move(self, by: int) -> None:
        """Go to the stage above or below."""
        cards = list(self.query(StageCard))
        if cards:
            at = cards.index(self.focused) if isinstance(self.focused, StageCard) else 0
            cards[max(0, min(len(cards) - 1, at + by))].focus()

    def action_open_log(self, rank: int) -> None:
        """Show the log of a stage."""
        from tui.screens.log import LogScreen

        self.app.push_screen(LogScreen(lambda: self._log_path(rank), f"stage {rank}"))

    @on(StageCard.LogWanted)
    def _log_wanted(self, message: StageCard.LogWanted) -> None:
        self.action_open_log(message.rank)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """A stage that is not there has no log."""
        if action == "open_log" and parameters:
            return parameters[0] in range(len(self._view.stages))
        return True

    def _log_path(self, rank: int) -> Path | None:
        client = self._session.client
        return client.log_path(rank) if client is not None else None


def summary(view: TelemetryView, paused_s: float | None) -> Content:
    """One line: the engine's state and its requests, or that the view stands still."""
    reason = f": {harmless(view.reason).splitlines()[0]}" if view.reason else ""
    requests = f"{view.running} running · {view.finished} finished"
    left = Content.assemble(
        (f"● {view.state}{reason}", STATE_STYLES.get(view.state, "$text-warning")),
        (f"   {requests} · {metrics.count(view.tokens)} tokens", DIM),
    )
    if paused_s is None:
        return left
    since = f"paused for {metrics.seconds(paused_s)}, still collecting"
    return Content.assemble((f" {since} ", "reverse $warning"), "  ", left)


def _rate_title(view: TelemetryView) -> Content:
    return Content.assemble(("tokens/s  ", "bold"), (_number(view.tokens_per_s), "$text-primary"))


def _ttft_title(view: TelemetryView) -> Content:
    return Content.assemble(
        ("first token  ", "bold"),
        (metrics.seconds(view.ttft_s), "$text-secondary"),
        (f"   median {metrics.seconds(view.ttft_median_s)}", DIM) if view.ttfts_s else "",
    )


def _number(value: float | None) -> str:
    return metrics.rate(value).removesuffix(" tok/s") if value != 0 else "0"


def _seconds(value: float) -> str:
    return metrics.seconds(value) if value else "0"
