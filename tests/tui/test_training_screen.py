"""The training screen under a pilot; the runs are processes that play a training."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Footer, Input

from engine.errors import ExitCode
from engine.processes import ProcessHandle, wait_all_gone
from tests.tui.fake_client import CONFIG, FakeClient
from tui import training_run
from tui.app import JupiterApp
from tui.run_folders import read_run
from tui.screens.dialogs import Confirm, Pick
from tui.screens.training import TrainingScreen
from tui.widgets.bars import TitleBar
from tui.widgets.run_list import RunList
from tui.widgets.training_form import FieldRow
from tui.widgets.training_run import RunView

DEADLINE_S = 20.0


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(training_run, "ATTENDED", "tests.fake_training")
    yield
    for run in (tmp_path / "runs").glob("v*"):  # of a test that failed half way
        process = read_run(run).process
        if process is not None and process.alive:
            os.kill(process.pid, signal.SIGKILL)


@pytest.fixture
def values(tmp_path: Path) -> dict[str, str]:
    """A form that is right; its run does three steps."""
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"query": "a", "response": "b"}) + "\n")
    return {"dataset": str(data), "save": str(tmp_path / "runs"), "train_iters": "3"}


class Bench:
    """The app on its training screen."""

    def __init__(self, app: JupiterApp, pilot: Pilot[int]) -> None:
        self.app, self.pilot = app, pilot

    @property
    def screen(self) -> TrainingScreen:
        screen = self.app._screen_stacks["training"][0]
        assert isinstance(screen, TrainingScreen)
        return screen

    @property
    def run(self) -> training_run.TrainingRun:
        assert self.screen.training is not None
        return self.screen.training

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                if self.app._exception is not None:
                    raise self.app._exception
                await self.pilot.pause(0.01)

    async def start(self, values: dict[str, str]) -> None:
        """Fill the form and start; back when the run has told of its steps."""
        self.screen._form.load(values)
        await self.pilot.press("ctrl+s")
        await self.until(lambda: self.screen.training is not None)
        await self.until(lambda: self.run.folder and len(self.run.history.points) == 3)

    async def phase(self, phase: str) -> None:
        await self.until(lambda: self.run.phase == phase)
        await self.pilot.pause()

    def shown(self) -> str:
        screen = self.app.screen
        lines = screen._compositor.render_strips(screen.size)
        return "\n".join(strip.text.rstrip() for strip in lines)


@asynccontextmanager
async def bench(size: tuple[int, int] = (120, 36)) -> AsyncIterator[Bench]:
    app = JupiterApp(CONFIG, FakeClient)
    async with app.run_test(size=size, notifications=True) as pilot:
        await pilot.press("f5")
        yield Bench(app, pilot)
        if app.is_running:
            await app.leave(ExitCode.OK)


def folder_of(bench: Bench) -> Path:
    assert bench.run.folder is not None
    return bench.run.folder


def row(bench: Bench, name: str) -> FieldRow:
    return bench.screen.query_one(f"#field-{name}", FieldRow)


async def test_what_is_wrong_is_told_at_its_field_and_nothing_starts() -> None:
    async with bench() as b:
        await b.pilot.press("tab", "x", "ctrl+s")
        await b.until(lambda: "1 field is wrong" in b.shown())
        assert row(b, "dataset").has_class("-wrong")
        assert "name the data files" in b.shown()
        assert b.app.focused is row(b, "dataset").query_one(Input)
        assert b.screen.training is None


async def test_a_value_of_the_wrong_kind_is_told_while_it_is_typed() -> None:
    async with bench() as b:
        row(b, "medusa_num_heads").focus_field()
        await b.pilot.press("x")
        await b.until(lambda: "must be a whole number from 1" in b.shown())
        await b.pilot.press("backspace", "4")
        await b.until(lambda: "must be a whole number from 1 " not in b.shown())
        assert not row(b, "medusa_num_heads").has_class("-wrong")


async def test_an_error_in_a_closed_group_opens_it(values: dict[str, str]) -> None:
    async with bench() as b:
        b.screen._form.load({**values, "adam_beta1": "7"})
        await b.pilot.press("ctrl+s")
        await b.until(lambda: b.screen.query("#field-adam_beta1"))
        await b.until(lambda: row(b, "adam_beta1").has_class("-wrong"))
        await b.until(lambda: b.app.focused is row(b, "adam_beta1").query_one(Input))


async def test_the_model_itself_is_trained_and_watched(values: dict[str, str]) -> None:
    async with bench() as b:
        await b.start({**values, "command": "sft"})
        await b.phase("finished")
        shown = b.shown()
        assert "step 3 of 3" in shown and "base" in shown and "50 %" in shown
        assert json.loads((folder_of(b) / "args.json").read_text())["command"] == "sft"
        assert b.screen._found is not None and b.screen._found.status == "finished"
        await b.pilot.press("r")
        assert b.screen._form.values["command"] == "sft"
        assert row(b, "lr").display and not row(b, "medusa_lr").display
        assert not b.screen.query("#use").first().display
        row(b, "command").set_text("medusa")
        await b.until(lambda: row(b, "medusa_lr").display)


async def test_a_run_is_watched_until_its_heads_are_there(values: dict[str, str]) -> None:
    async with bench() as b:
        await b.start(values)
        await b.phase("finished")
        shown = b.shown()
        assert "● finished" in shown and "step 3 of 3" in shown
        assert "loss per head  1: 1.33  2: 2.33" in shown
        assert "tokens/s  321" in shown and "rank 0 memory  1.00 GiB" in shown
        assert b.run.said == "step 3 is done"
        assert not b.run.running
        assert b.screen.check_action("stop", ()) is False
        assert b.screen.check_action("use_heads", ()) is False  # the engine is not ready
        await b.pilot.press("l")
        await b.until(lambda: "step 3 is done" in b.shown())
        await b.pilot.press("escape")
        await b.until(lambda: b.app.screen is b.screen)


async def test_stop_saves_a_checkpoint_and_the_run_can_be_gone_on_with(
    values: dict[str, str],
) -> None:
    async with bench() as b:
        await b.start({**values, "train_iters": "100", "medusa_lr": "0.0005"})
        await b.until(lambda: "step 3 of 100 · 1 min 37 s left · 3 s so far" in b.shown())
        await b.pilot.press("s")
        await b.phase("stopped")
        folder = b.run.folder
        assert folder is not None
        assert read_run(folder).checkpoint == 3
        await b.pilot.press("r")
        await b.until(lambda: b.screen.page == "new")
        form = b.screen._form.values
        assert (form["load"], form["medusa_lr"]) == (str(folder), "0.0005")
        assert row(b, "load").query_one(Input).value == str(folder)


async def test_what_the_run_finds_wrong_goes_to_its_field(values: dict[str, str]) -> None:
    async with bench() as b:
        b.screen._form.load({**values, "seed": "13"})
        await b.pilot.press("ctrl+s")
        await b.until(lambda: b.screen.training is not None)
        await b.phase("failed")
        await b.until(lambda: row(b, "dataset").has_class("-wrong"))
        assert b.screen.page == "new"
        assert "line 2: not JSON" in b.shown()


async def test_the_second_stop_asks_before_it_ends_a_run_at_once(values: dict[str, str]) -> None:
    async with bench() as b:
        await b.start({**values, "train_iters": "100"})
        b.run.phase = "stopping"  # as after the first, for a step that takes long
        await b.pilot.press("s")
        await b.until(lambda: isinstance(b.app.screen, Confirm))
        await b.pilot.click("#yes")
        await b.phase("failed")
        assert "was killed by SIGKILL" in b.run.problem


async def test_quitting_asks_and_a_run_that_is_left_can_be_attached_to(
    values: dict[str, str],
) -> None:
    async with bench() as b:
        await b.start({**values, "train_iters": "100"})
        folder = b.run.folder
        await b.pilot.press("ctrl+q")
        await b.until(lambda: isinstance(b.app.screen, Pick))
        await b.pilot.press("end", "enter")  # stay here
        await b.until(lambda: b.app.screen is b.screen)
        assert b.run.running
        await b.pilot.press("ctrl+q")
        await b.until(lambda: isinstance(b.app.screen, Pick))
        await b.pilot.press("down", "enter")  # leave it running
        await b.until(lambda: not b.app.is_running)
    assert folder is not None
    left = read_run(folder)
    assert left.status == "running" and left.process is not None
    process = ProcessHandle(left.process.pid)
    async with bench() as b:
        await b.pilot.press("ctrl+pageup")
        await b.until(lambda: folder.name in b.shown())
        await b.until(lambda: b.app.focused is b.screen.query_one(RunList))
        await b.pilot.press("enter")
        await b.until(lambda: b.screen.training is not None)
        assert b.run.running and not b.run.own
        assert b.run.phase == "training"
        assert len(b.run.history.points) == 3
        await b.pilot.press("s")
        await b.phase("stopped")
    assert wait_all_gone([process], DEADLINE_S)
    process.close()


async def test_quitting_with_stop_waits_for_the_checkpoint(values: dict[str, str]) -> None:
    async with bench() as b:
        await b.start({**values, "train_iters": "100"})
        folder = b.run.folder
        await b.pilot.press("ctrl+q")
        await b.until(lambda: isinstance(b.app.screen, Pick))
        await b.pilot.press("enter")
        await b.until(lambda: not b.app.is_running)
        assert folder is not None
        assert read_run(folder).status == "stopped"


async def test_no_run_outlives_a_workbench_that_ends_without_asking(
    values: dict[str, str],
) -> None:
    async with bench() as b:
        await b.start({**values, "train_iters": "100"})
        folder = b.run.folder
        assert folder is not None
        process = read_run(folder).process
        assert process is not None
        handle = ProcessHandle(process.pid)
        await b.app.leave(ExitCode.TERMINATED)
    assert wait_all_gone([handle], DEADLINE_S)
    handle.close()
    assert read_run(folder).checkpoint == 3


async def test_what_is_no_run_folder_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    async with bench() as b:
        await b.pilot.click("Tab#runs")
        await b.until(lambda: "No runs yet" in b.shown())
        await b.pilot.press("o", *str(tmp_path / "x"), "enter")
        await b.until(lambda: "no run folder" in b.shown())


@pytest.mark.parametrize("size", [(80, 24), (120, 36), (200, 60)])
async def test_every_size_shows_all_parts(size: tuple[int, int], values: dict[str, str]) -> None:
    async with bench(size) as b:
        for page in ("new", "run"):
            if page == "run":
                await b.start(values)
                await b.phase("finished")
            top = 0
            for part in (TitleBar, "Tabs", "ContentSwitcher", Footer):
                region = b.screen.query_one(part).region
                assert region.y >= top
                top = region.bottom
            assert top == size[1]
            assert max(map(len, b.shown().splitlines())) <= size[0]
        charts = list(b.screen.query_one(RunView).query("LineChart"))
        shown = [chart for chart in charts if chart.display]
        assert len(shown) == (4 if size[0] == 80 else 5)
        assert all(chart.region.height >= 4 for chart in shown)
        assert all("n/a" not in str(chart.render()) for chart in shown)
