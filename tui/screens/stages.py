"""The stage editor: which stage holds which layers, what that costs, and how to change it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from msgspec.structs import replace
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.message import Message
from textual.reactive import reactive
from textual.screen import Screen
from textual.widgets import Footer

from engine.checkpoint.sources import resolve_cached
from engine.config import JupiterConfig, find_config
from engine.config_file import save_split
from engine.errors import ConfigError, JupiterError
from engine.planning.memory import ModelSizes, read_sizes
from tui import metrics
from tui.planned import Planner
from tui.snapshot import Snapshot
from tui.speeds import SpeedStore
from tui.stage_draft import StageDraft
from tui.stage_view import ERROR_SHARE, WARNING_SHARE, StageFacts, cards, comparison
from tui.text import log_text
from tui.widgets.apply_progress import ApplyProgress
from tui.widgets.bars import TitleBar
from tui.widgets.comparison import Comparison
from tui.widgets.draft_card import DraftCard, DraftCards
from tui.widgets.split_bar import SplitBar

if TYPE_CHECKING:
    from engine.client import Update
    from tui.session import EngineSession

HINT = "←→ choose a stage · ↑↓ its layers · or drag a boundary"
NO_STEPS = "the times are n/a until an answer was measured"
LEAP = 5
NARROW, SHORT = 100, 30


class StagesScreen(Screen[None]):
    """Owns the draft of the split; applying it is the session's transaction."""

    HELP = f"""
    One column per stage: its layers and what else it holds. **Nothing changes before Apply**:
    the bar and the columns show the draft, `╵` below the bar where the live boundaries are.

    - **weights** and **KV cache**: exact, from the sizes of the tensors. The cache is for as many
      sequences at once as the live engine has made room for, each as long as the context.
    - **activations**: what the largest step needs besides, estimated from the tensors' shapes.
    - **process now** / **device now**: measured; on CPU it includes Python and torch.
    - The bar in a column is the share of its device's memory, all stages there together: yellow
      from {WARNING_SHARE:.0%}, red from {ERROR_SHARE:.0%}.
    - **ms per step**: computing of one decode step. Measured while nothing is changed; for a draft
      predicted from the measured time per layer. After a change it is predicted from what was
      measured before, until an answer was measured.
    - **first token** and **per token**: live is the latest answer; the draft's is predicted from
      the time per layer, the heads' time and the time of a hop between stages, all measured, in
      proportion to what was measured live.
    - `≈` marks what is predicted; `n/a` what was not measured, such as a hop while there is one
      stage.

    **Planned** drafts the split that the planner chooses for as many stages, from what `jupiter
    plan` (or a start with `auto`) measured. Its own predictions then stand below, for a prompt of
    512 tokens.

    **Apply** checks the draft, stops answers at the end of a step, starts the stages anew, tries
    them on one token and lets the answers go on where they were. If the new stages do not come
    up, the old split is started again. **Save** writes the draft to config.json.
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "apply", "Apply", id="stages.apply", tooltip="Run the drafted split"),
        Binding("escape", "revert", "Revert", id="stages.revert", tooltip="Back to the live split"),
        Binding("a", "add", "Add", id="stages.add", tooltip="Cut the chosen stage in two"),
        Binding("d,delete", "remove", "Remove", id="stages.remove", tooltip="Take the stage away"),
        Binding("e", "even", "Even", id="stages.even", tooltip="As many layers on every stage"),
        Binding("p", "plan", "Planned", id="stages.plan", tooltip="The planner's split"),
        Binding("s", "save", "Save", id="stages.save", tooltip="Write the split to config.json"),
        Binding("left", "choose(-1)", "Stage before", show=False, id="stages.before"),
        Binding("right", "choose(1)", "Next stage", show=False, id="stages.next"),
        Binding("up,plus", "grow(1)", "One layer more", show=False, id="stages.more"),
        Binding("down,minus", "grow(-1)", "One layer fewer", show=False, id="stages.fewer"),
        Binding("pageup", f"grow({LEAP})", f"{LEAP} more", show=False, id="stages.leap_more"),
        Binding("pagedown", f"grow(-{LEAP})", f"{LEAP} fewer", show=False, id="stages.leap_fewer"),
        Binding("question_mark", "app.help", "Help", show=False, id="stages.help"),
    ]
    DEFAULT_CSS: ClassVar[str] = """
    StagesScreen {
        & > SplitBar { margin: 1 0; }
        #body { height: 1fr; scrollbar-size-vertical: 1; }
        Comparison { margin: 1 0 0 0; }
        &.-short > SplitBar { margin: 0; }
        &.-short Comparison { margin: 0; }
    }
    """

    snapshot: reactive[Snapshot | None] = reactive(None, init=False, bindings=True)
    draft: reactive[StageDraft] = reactive(StageDraft((1,), (1,)), init=False, bindings=True)

    class FiguresChanged(Message):
        """Something was measured."""

        def can_replace(self, message: Message) -> bool:
            """One of them in the queue is enough."""
            return isinstance(message, StagesScreen.FiguresChanged)

    def __init__(
        self, session: EngineSession, speeds: SpeedStore, config_given: str | None = None
    ) -> None:
        """`config_given` is the path of `--config`, if there was one: where Save writes to."""
        super().__init__()
        self._session = session
        self._speeds = speeds
        self._config_given = config_given
        self._sizes: ModelSizes | None = None
        self._sizes_of: tuple[object, ...] | None = None
        self._applying = False
        self._planner: Planner | None = None
        self.set_reactive(StagesScreen.draft, StageDraft.of(session.snapshot.split or (1,)))

    def compose(self) -> ComposeResult:
        """Title, the bar of the whole model, a column per stage, draft against live, keys."""
        yield TitleBar()
        yield SplitBar()
        with VerticalScroll(id="body", can_focus=False):
            yield DraftCards()
            yield Comparison()
        yield ApplyProgress(HINT)
        yield Footer()

    def on_mount(self) -> None:
        """Show what is known, and be told of what is measured from now on."""
        self.snapshot = self._session.snapshot
        self._unlisten = self._session.add_listener(self._heard)

    def on_resize(self, event: events.Resize) -> None:
        """Draw everything closer together where there is little room."""
        self.query_one(Footer).compact = event.size.width < NARROW
        self.set_class(event.size.height < SHORT, "-short")

    def on_unmount(self) -> None:
        """Listen no longer."""
        self._unlisten()

    def _heard(self, update: Update) -> None:
        if self.is_current:
            self.post_message(self.FiguresChanged())

    # --- what is shown ---------------------------------------------------------------------

    def watch_snapshot(self, snapshot: Snapshot) -> None:
        """Follow the engine: its split when it is ready, its progress while it changes."""
        self.query_one(TitleBar).snapshot = snapshot
        if self._applying and snapshot.phase == "applying":
            self.query_one(ApplyProgress).follow(snapshot)
        if snapshot.phase in ("ready", "starting") and snapshot.split:
            self.draft = self.draft.follow(snapshot.split)
        self._read_sizes(snapshot)

    def _read_sizes(self, snapshot: Snapshot) -> None:
        """Measure the model's files once they are here, and again when the config has changed."""
        config = self._session.config
        split = config.stage_num_hidden_layers_list
        kind = (replace(config, stage_num_hidden_layers_list=[1]), snapshot.ready is not None)
        if split and kind != self._sizes_of:
            self._sizes_of = kind
            self.run_worker(self._load_sizes(config), group="sizes", exclusive=True)

    async def _load_sizes(self, config: JupiterConfig) -> None:
        try:
            self._sizes = await asyncio.to_thread(sizes_of, config)
        except JupiterError:
            self._sizes = None  # the launch says what is wrong with the files
        await self._show()

    async def watch_draft(self) -> None:
        """Draw the new draft."""
        await self._show()

    @on(FiguresChanged)
    async def _figures_changed(self) -> None:
        await self._show()

    async def on_screen_resume(self) -> None:
        """Show what was measured meanwhile."""
        await self._show()

    def facts(self) -> StageFacts:
        """All that is known at this moment."""
        config = self._session.config
        return StageFacts(
            self.draft,
            self._sizes,
            self._speeds.live(),
            self._speeds.measured(),
            num_sub_sequences=config.num_sub_sequences,
            max_sub_sequence_len=config.max_sub_sequence_len,
        )

    async def _show(self) -> None:
        if not self.is_attached:
            return
        facts = self.facts()
        self.query_one(SplitBar).draft = self.draft
        lines = comparison(facts)
        if self._planner is not None:
            lines += self._planner.lines(self.draft.live, self.draft.split)
        self.query_one(Comparison).show(lines, note=self._note(facts))
        await self.query_one(DraftCards).show(cards(facts), self.draft.chosen)

    def _note(self, facts: StageFacts) -> str:
        if not facts.measured.stages:
            return NO_STEPS
        if facts.measured.split != facts.draft.live:
            return f"times measured on {metrics.split(facts.measured.split)}"
        return "change"

    # --- editing ---------------------------------------------------------------------------

    def _edit(self, draft: StageDraft) -> None:
        """Take an edit of the user; a word about the last change has had its time."""
        if not self._applying:
            self.query_one(ApplyProgress).clear()
        self.draft = draft

    def action_choose(self, by: int) -> None:
        """Act on a neighbour of the chosen stage."""
        self._edit(self.draft.choose(self.draft.chosen + by))

    def action_grow(self, layers: int) -> None:
        """Give the chosen stage more layers, or fewer."""
        self._edit(self.draft.grow(layers))

    def action_add(self) -> None:
        """Cut the chosen stage in two."""
        self._edit(self.draft.add())

    def action_remove(self) -> None:
        """Give the chosen stage's layers to its neighbours."""
        self._edit(self.draft.remove())

    def action_even(self) -> None:
        """Make all stages as equal as can be."""
        self._edit(self.draft.even())

    def action_plan(self) -> None:
        """Draft the planner's split, in the background."""
        self.run_worker(self._plan(self._session.config, len(self.draft.split)), group="plan")

    async def _plan(self, config: JupiterConfig, stages: int) -> None:
        try:
            self._planner = await asyncio.to_thread(planner_of, config, stages)
            split = await asyncio.to_thread(self._planner.split)
        except JupiterError as error:
            self.notify(str(error), title="No plan", severity="warning", markup=False)
        else:
            self._edit(self.draft.take(split))
            await self._show()  # its predictions, where the draft is the same

    def action_revert(self) -> None:
        """Back to the live split."""
        self._edit(self.draft.revert())

    @on(SplitBar.Moved)
    def _boundary_moved(self, message: SplitBar.Moved) -> None:
        self._edit(self.draft.move(message.boundary, message.to))

    @on(SplitBar.Chosen)
    @on(DraftCard.Chosen)
    def _stage_chosen(self, message: SplitBar.Chosen | DraftCard.Chosen) -> None:
        self._edit(self.draft.choose(message.stage))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer only what the state allows."""
        draft = self.draft
        match action:
            case "apply":
                phase = self.snapshot.phase if self.snapshot else ""
                return draft.changed and phase in ("ready", "failed", "recovering")
            case "revert":
                return draft.changed
            case "add":
                return draft.can_add
            case "remove":
                return draft.can_remove
            case "even":
                return draft.even() != draft
        return True

    # --- applying and saving ---------------------------------------------------------------

    def action_apply(self) -> None:
        """Have the engine go over to the draft, in the background."""
        if not self._applying:
            self._applying = True
            self.run_worker(self._apply(self.draft.split), group="apply")

    async def _apply(self, split: tuple[int, ...]) -> None:
        progress = self.query_one(ApplyProgress)
        progress.begin()
        # Chunks that were planned for another split are not this one's.
        config = replace(
            self._session.config, stage_num_hidden_layers_list=list(split), prefill_plan={}
        )
        try:
            await self._session.apply(config)
        except JupiterError as error:
            self._settle()
            progress.end(str(error), failed=True)
            self.notify(
                log_text(str(error)), title="Split not applied", severity="error", markup=False
            )
        else:
            self._settle()
            progress.end(f"The engine runs {metrics.split(split)}", failed=False)

    def _settle(self) -> None:
        """The change is over: what runs now is what the session says."""
        self._applying = False
        snapshot = self._session.snapshot
        if snapshot.phase == "ready":
            self.draft = self.draft.follow(snapshot.split)
        self.refresh_bindings()

    def action_save(self) -> None:
        """Write the drafted split to the config file."""
        try:
            path = save(self.draft.split, self._config_given)
        except JupiterError as error:
            self.notify(str(error), title="Not saved", severity="error", markup=False)
        else:
            text = f"{metrics.split(self.draft.split)} is now the split in {path}"
            self.notify(text, title="Saved", markup=False)


def sizes_of(config: JupiterConfig) -> ModelSizes | None:
    """The sizes of a config's model; None while it is not on this machine."""
    folder = resolve_cached(config.base_model_name_or_path)
    return None if folder is None else read_sizes(folder, config)


def planner_of(config: JupiterConfig, stages: int) -> Planner:
    """The planner of a config's model; raises JupiterError where nothing was measured."""
    folder = resolve_cached(config.base_model_name_or_path)
    if folder is None:
        raise ConfigError(f"{config.base_model_name_or_path} is not on this machine")
    return Planner.load_for(config, folder, stages)


def save(split: tuple[int, ...], given: str | None) -> Path:
    """Write the split to the config in use; one that came with the package is copied here first.

    Returns the file; raises ConfigError when it cannot be written.
    """
    source = find_config(given)
    target = source if given else Path("config.json")
    save_split(target, split, source)
    return target.absolute()
