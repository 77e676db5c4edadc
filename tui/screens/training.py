"""Training: a form to start a run, its course as charts, and the runs there have been."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.reactive import reactive
from textual.screen import Screen
from textual.widgets import Button, ContentSwitcher, Footer, OptionList, Static, Tab, Tabs

from engine.errors import JupiterError
from tui.run_folders import RunFolder, read_run, recent_runs, remember
from tui.screens.dialogs import AskLine, Confirm, Pick
from tui.screens.training_help import HELP
from tui.snapshot import Snapshot
from tui.text import harmless
from tui.themes import DIM
from tui.training_form import at_field, check, resumed
from tui.training_run import TrainingRun
from tui.widgets.bars import TitleBar
from tui.widgets.run_list import RunList
from tui.widgets.training_form import FieldRow, TrainingForm
from tui.widgets.training_run import RunView

if TYPE_CHECKING:
    from tui.session import EngineSession

LOOK_EVERY_S = 0.25
BREAKPOINTS: list[tuple[int, str]] = [(0, "-narrow"), (100, "-wide")]
PAGES = ("new", "run", "runs")
NO_RUN = "No run is open: start one on the first page, or choose one on the last."
LEAVING = (
    "Stop it with a checkpoint, then quit",
    "Leave it running, and quit",
    "Stay here",
)


class TrainingScreen(Screen[None]):
    """Owns the run that is looked at; there is at most one."""

    HELP = HELP
    DEFAULT_CSS = """
    TrainingScreen {
        Tabs { height: 2; }
        ContentSwitcher { height: 1fr; }
        .bar { height: 1; padding: 0 1; }
        .bar Button { margin: 0 1 0 0; min-width: 8; }
        .bar Static { width: 1fr; height: 1; color: $foreground 60%; }
        #new-page, #run-page, #runs-page { height: 1fr; }
        #no-run { padding: 1 2; }
        #about-field { height: 3; padding: 0 1; color: $foreground 60%; border-top: solid $panel; }
        &.-narrow #accuracy { display: none; }
        &.-narrow #loss { column-span: 6; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "start", "Start", id="training.start", tooltip="Check and start the run"),
        Binding(
            "ctrl+pagedown",
            "page(1)",
            "Next page",
            priority=True,
            id="training.next_page",
            tooltip="New run, Run, Runs",
        ),
        Binding(
            "ctrl+pageup",
            "page(-1)",
            "Previous page",
            show=False,
            priority=True,
            id="training.previous_page",
        ),
        Binding("s", "stop", "Stop", id="training.stop", tooltip="Stop with a checkpoint"),
        Binding("r", "resume", "Resume", id="training.resume", tooltip="Go on with this run"),
        Binding("u", "use_heads", "Use heads", id="training.use", tooltip="Heads into the chat"),
        Binding("l", "log", "Log", id="training.log", tooltip="What the run has said"),
        Binding("o", "open", "Open", id="training.open", tooltip="Open a run folder"),
    ]
    HORIZONTAL_BREAKPOINTS = BREAKPOINTS
    AUTO_FOCUS = "#field-dataset Input"

    snapshot: reactive[Snapshot | None] = reactive(None, init=False)
    page: reactive[str] = reactive("new", init=False, bindings=True)

    def __init__(self, session: EngineSession) -> None:
        super().__init__()
        self._session = session
        self.training: TrainingRun | None = None
        """The open run."""
        self._found: RunFolder | None = None
        """Its folder, as it was when the run last changed its state."""
        self._asking = False

    def compose(self) -> ComposeResult:
        """Title, pages, keys."""
        yield TitleBar()
        yield Tabs(Tab("New run", id="new"), Tab("Run", id="run"), Tab("Runs", id="runs"))
        with ContentSwitcher(initial="new-page"):
            with Vertical(id="new-page"):
                yield TrainingForm({"model": self._session.config.base_model_name_or_path})
                yield Static(id="about-field")
                with Horizontal(classes="bar"):
                    yield Button("Start", variant="primary", action="screen.start", compact=True)
                    yield Static(id="verdict")
            with Vertical(id="run-page"):
                yield Static(NO_RUN, id="no-run")
                yield RunView()
                with Horizontal(classes="bar"):
                    yield Button("Stop", id="stop", action="screen.stop", compact=True)
                    yield Button("Resume", id="resume", action="screen.resume", compact=True)
                    yield Button("Use heads", id="use", action="screen.use_heads", compact=True)
                    yield Button("Log", id="log", action="screen.log", compact=True)
            with Vertical(id="runs-page"):
                yield RunList()
                with Horizontal(classes="bar"):
                    yield Button("Open a folder", action="screen.open", compact=True)
        yield Footer()

    def on_mount(self) -> None:
        """Show the form; look at the open run from time to time."""
        self.snapshot = self._session.snapshot
        self._show_run()
        self.set_interval(LOOK_EVERY_S, self._look)

    def watch_snapshot(self, snapshot: Snapshot) -> None:
        """The chat's engine changed."""
        self.query_one(TitleBar).snapshot = snapshot
        self._show_offers()

    # --- pages -------------------------------------------------------------------------------

    @on(Tabs.TabActivated)
    def _page_chosen(self, event: Tabs.TabActivated) -> None:
        self.page = event.tab.id or "new"

    def watch_page(self, page: str) -> None:
        """Show a page."""
        self.query_one(Tabs).active = page
        self.query_one(ContentSwitcher).current = f"{page}-page"
        if page == "runs":
            self._list_runs()
        elif page == "run":
            if not isinstance(self.focused, Tabs):
                self.set_focus(None)  # no key may go to a field that is hidden now
            self._show_run()

    def action_page(self, step: int) -> None:
        """Turn to the next page or the one before, and put the cursor where it is of use."""
        self.page = PAGES[(PAGES.index(self.page) + step) % len(PAGES)]
        self.call_after_refresh(self._focus_page)

    def _focus_page(self) -> None:
        match self.page:
            case "new":
                self.query(self.AUTO_FOCUS).first().focus()
            case "run":
                self.set_focus(None)
            case "runs":
                self.query_one(RunList).focus()

    @work(exclusive=True, group="runs")
    async def _list_runs(self) -> None:
        runs = await asyncio.to_thread(recent_runs)  # files of many folders
        self.query_one(RunList).show(runs)

    # --- a new run ---------------------------------------------------------------------------

    @property
    def _form(self) -> TrainingForm:
        return self.query_one(TrainingForm)

    @work(exclusive=True, group="training")
    async def action_start(self) -> None:
        """Check the form; start the run if nothing is wrong."""
        checked = check(self._form.fields, self._form.values)
        await self._form.show(checked)
        wrong = len(checked.errors)
        if wrong:
            self._judge(f"{wrong} field{'s are' if wrong > 1 else ' is'} wrong", "$text-error")
            return
        if self.training is not None and self.training.running:
            self._judge("a run is under way: stop it first", "$text-error")
            return
        try:
            run = TrainingRun.start(checked.kind, checked.words, checked.ranks)
        except JupiterError as error:
            self._judge(str(error), "$text-error")
            return
        self._judge(checked.command, DIM)
        self._watch(run)

    @on(FieldRow.Entered)
    def _explain(self, event: FieldRow.Entered) -> None:
        self.query_one("#about-field", Static).update(Content(harmless(event.field.about)))

    def _judge(self, text: str, style: str) -> None:
        self.query_one("#verdict", Static).update(Content.styled(harmless(text), style))

    def action_resume(self) -> None:
        """Fill the form with all that the open run was told, and its last checkpoint."""
        if self._found is not None:
            self._form.load(resumed(self._found, self._form.fields))
            self._judge(f"goes on after step {self._found.checkpoint}", DIM)
            self.page = "new"

    # --- the open run ------------------------------------------------------------------------

    def _watch(self, run: TrainingRun) -> None:
        """Have this run on the page from now on."""
        if self.training is not None:
            self.training.close()
        self.training, self._found = run, None
        self._find()
        self.page = "run"
        self._show_run()

    def _look(self) -> None:
        """What has the run done meanwhile?"""
        run = self.training
        if run is None:
            return
        before = run.phase
        if not run.poll():
            return
        if run.phase != before or (self._found is None and run.folder is not None):
            self._find()
            self._show_offers()
        if run.phase != before:
            self._tell_change(run)
        if self.page == "run":
            self.query_one(RunView).show(run)

    def _find(self) -> None:
        """Read what the run's folder holds now."""
        folder = self.training.folder if self.training is not None else None
        try:
            self._found = None if folder is None else read_run(folder)
        except JupiterError:
            self._found = None

    def _tell_change(self, run: TrainingRun) -> None:
        """A run that ended is told wherever the user is; an error of the form goes to its field."""
        name = run.folder.name if run.folder is not None else "the run"
        match run.phase:
            case "finished":
                self.notify(f"{name} has finished", title="Training", markup=False)
            case "failed":
                self.notify(run.problem, title="Training failed", severity="error", markup=False)
                at = at_field(run.problem, self._form.fields, self._form.values)
                if at is not None and run.folder is None:
                    self.page = "new"
                    self._form.tell(*at)
                    self._judge("the run has found a field wrong", "$text-error")

    def _show_run(self) -> None:
        run = self.training
        self.query_one("#no-run").display = run is None
        view = self.query_one(RunView)
        view.display = run is not None
        if run is not None and self.page == "run":
            view.show(run)
        self._show_offers()

    def _show_offers(self) -> None:
        """The buttons and keys that the page and the state allow."""
        self.refresh_bindings()
        for name, action in (
            ("#stop", "stop"),
            ("#resume", "resume"),
            ("#use", "use_heads"),
            ("#log", "log"),
        ):
            self.query_one(name).display = bool(self.check_action(action, ()))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer only what the page and the state allow."""
        run, found = self.training, self._found
        on_run = self.page == "run" and run is not None
        match action:
            case "start":
                return self.page == "new"
            case "open":
                return self.page == "runs"
            case "stop":
                return on_run and run is not None and run.running
            case "log":
                return on_run and run is not None and run.log is not None
            case "resume":
                over = on_run and run is not None and not run.running
                return over and found is not None and found.checkpoint is not None
            case "use_heads":
                ready = self.snapshot is not None and self.snapshot.phase == "ready"
                return on_run and ready and found is not None and found.heads is not None
        return True

    @work(group="stop")
    async def action_stop(self) -> None:
        """Stop with a checkpoint; asked again, offer to end it at once."""
        run = self.training
        if run is None:
            return
        if run.phase != "stopping":
            run.stop()
            self._show_run()
            return
        question = "End the run at once? What it learnt since its last checkpoint is lost."
        if await self.app.push_screen_wait(Confirm(question, "End it")):
            run.kill()

    def action_log(self) -> None:
        """Show what the run has said."""
        from tui.screens.log import LogScreen

        if self.training is not None and self.training.log is not None:
            log = self.training.log
            self.app.push_screen(LogScreen(lambda: log, "Training"))

    def action_use_heads(self) -> None:
        """Switch the chat to the run's heads, measured or not."""
        from tui.screens.heads import HeadsScreen

        if self._found is not None:
            self.app.push_screen(HeadsScreen(self._session, self._found))

    # --- other runs --------------------------------------------------------------------------

    @on(OptionList.OptionSelected, "RunList")
    def _run_chosen(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self._open(Path(event.option_id or ""))

    def action_open(self) -> None:
        """Ask for a run folder."""

        def use(text: str) -> None:
            self._open(Path(text.strip()).expanduser(), asked=True)

        self.app.push_screen(AskLine("Run folder", "", use))

    def _open(self, path: Path, *, asked: bool = False) -> None:
        """Look at a run; raises JupiterError only where the user is asked for its folder."""
        run = self.training
        if run is not None and run.own and run.folder != path:
            self.notify("Another run is under way; stop it before opening one", severity="warning")
            return
        try:
            found = read_run(path.absolute())
            remember(found.path)
        except JupiterError as error:
            if asked:
                raise
            self.notify(str(error), severity="error", markup=False)
            return
        except OSError as error:
            self.notify(f"The list of runs cannot be kept: {error}", severity="warning")
        if run is None or not run.own:
            self._watch(TrainingRun.open(found))
        self.page = "run"

    # --- leaving -----------------------------------------------------------------------------

    async def may_leave(self) -> bool:
        """Whether the workbench may end; asks what becomes of a run of its own. In a worker."""
        run = self.training
        if run is None or not run.own or run.phase == "stopping":
            return True
        if self._asking:
            return False
        self._asking = True
        try:
            choices = [Content(choice) for choice in LEAVING]
            choice = await self.app.push_screen_wait(Pick("A training run is under way", choices))
        finally:
            self._asking = False
        if choice == 1:
            run.leave()
        elif choice == 0:
            run.stop()
            self.notify("Quits when the checkpoint is saved; quit again to leave at once")
            while run.running and self.is_running:
                await asyncio.sleep(LOOK_EVERY_S)
        return choice in (0, 1)

    def on_unmount(self) -> None:
        """A run that was not left stops with a checkpoint."""
        if self.training is not None:
            self.training.close()
