"""From the training screen to the chat, for real: tiny heads learn and are switched in."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual.content import Content
from textual.pilot import Pilot

from engine.config import JupiterConfig
from engine.errors import ExitCode
from engine.processes import ProcessHandle, wait_all_gone
from engine.training.checkpoint import find
from tests.engine.training.ranks import steps
from tests.tiny import tiny_folder
from tui.app import JupiterApp
from tui.heads_switch import Measured
from tui.run_folders import read_run
from tui.screens import heads
from tui.screens.dialogs import Pick
from tui.screens.heads import HeadsScreen
from tui.screens.training import TrainingScreen
from tui.training_form import RANKS

DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    for run in (tmp_path / "runs").glob("v*"):  # of a test that failed half way
        process = read_run(run).process
        if process is not None and process.alive:
            os.kill(process.pid, signal.SIGKILL)


@pytest.fixture
def form(tmp_path: Path) -> dict[str, str]:
    """A form for a run of the tiny model that takes a few seconds."""
    rows = [{"query": "ask" * (n % 3 + 1), "response": "abcdefgh"[: 2 + n % 6]} for n in range(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(tiny_folder(layers=3)), "dataset": str(data), "save": str(tmp_path / "runs"),
        "global_batch_size": "4", "medusa_num_heads": "2", "split_dataset_ratio": "0.25",
        "train_iters": "6", "log_interval": "2",
    }  # fmt: skip


class Bench:
    def __init__(self, app: JupiterApp, pilot: Pilot[int]) -> None:
        self.app, self.pilot = app, pilot
        self.until_ready = lambda: self.until(lambda: app.session.snapshot.phase == "ready")

    @property
    def screen(self) -> TrainingScreen:
        screen = self.app._screen_stacks["training"][0]
        assert isinstance(screen, TrainingScreen)
        return screen

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                if self.app._exception is not None:
                    raise self.app._exception
                await self.pilot.pause(0.02)

    async def click(self, selector: str) -> None:
        """Click a button once it is shown; what appears above it may move it under the pointer."""
        await self.until(lambda: self.app.screen.query_one(selector).display)
        async with asyncio.timeout(DEADLINE_S):
            await self.pilot.pause()
            while not await self.pilot.click(selector):
                await self.pilot.pause()

    async def start(self, form: dict[str, str], points: int) -> None:
        self.screen._form.load(form)
        await self.pilot.press("ctrl+s")
        await self.until(lambda: self.screen.training)
        run = self.screen.training
        assert run is not None
        await self.until(lambda: len(run.history.points) >= points or not run.running)
        assert not run.problem


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    config = JupiterConfig(
        base_model_name_or_path=str(tiny_folder(layers=3)),
        stage_num_hidden_layers_list=[1, 2],
        device="cpu",
        num_threads=1,
        max_kv_cache_length=512,
    )
    app = JupiterApp(config)
    async with app.run_test(size=(120, 36), notifications=True) as pilot:
        await pilot.press("f5")
        try:
            yield Bench(app, pilot)
        finally:
            if app.is_running:
                await app.leave(ExitCode.OK)


async def test_heads_learn_and_go_into_the_chat_measured_before_and_after(
    form: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[Measured, Measured]] = []
    table = heads.side_by_side

    def note(before: Measured, after: Measured) -> Content:
        shown.append((before, after))
        return table(before, after)

    monkeypatch.setattr(heads, "side_by_side", note)
    async with bench() as b:
        await b.start(form, points=6)
        run = b.screen.training
        assert run is not None
        await b.until(lambda: not run.running)
        assert (run.phase, run.problem) == ("finished", "")
        # Every step was told by the queue, with the figures that the log has means of.
        points, logged = run.history.points, steps(run.folder)
        assert [point.iteration for point in points] == [1, 2, 3, 4, 5, 6]
        mean = (points[0].loss_per_head[0] + points[1].loss_per_head[0]) / 2
        assert logged[0]["loss_per_head"][0] == pytest.approx(mean)
        assert points[-1].lr == logged[-1]["learning_rate"]
        assert run.history.evaluations[-1].iteration == 6
        await b.until_ready()
        await b.pilot.press("u")
        await b.until(lambda: isinstance(b.app.screen, HeadsScreen))
        await b.click("#measured")
        await b.until(lambda: shown)
        before, after = shown[0]
        assert (before.heads, after.heads) == (0, 2)
        # Greedy answers do not depend on heads, so the steps compare like with like.
        assert before.answers == after.answers
        assert before.tokens_per_step == 1.0
        # The tuner tries a step without drafts now and then.
        assert 0 < after.proposed[0] <= after.steps
        assert after.step_tokens == before.step_tokens
        assert b.app.session.config.medusa_head_path == str(run.folder / "heads")
        await b.click("#back")
        await b.until(lambda: b.app.session.config.medusa_head_path is None)
        await b.until_ready()
        ready = b.app.session.snapshot.ready
        assert ready is not None and ready.medusa_num_heads == 0


async def test_the_model_itself_learns_over_two_ranks(form: dict[str, str]) -> None:
    settings = {"command": "sft", RANKS: "2", "tensor_model_parallel_size": "2", "lr": "1e-3"}
    kept = {name: value for name, value in form.items() if not name.startswith("medusa")}
    async with bench() as b:
        await b.start({**kept, **settings}, points=6)
        run = b.screen.training
        assert run is not None
        await b.until(lambda: not run.running)
        assert (run.phase, run.problem) == ("finished", "")
        assert [point.iteration for point in run.history.points] == [1, 2, 3, 4, 5, 6]
        logged = steps(run.folder)
        assert run.history.points[-1].lr == logged[-1]["learning_rate"]
        assert run.history.evaluations[-1].iteration == 6
        assert read_run(run.folder).checkpoint == 6


async def test_a_run_that_is_left_is_attached_to_stopped_and_gone_on_with(
    form: dict[str, str],
) -> None:
    endless = {**form, "train_iters": "1000000", "eval_iters": "0", "log_interval": "1"}
    async with bench() as b:
        await b.start(endless, points=2)
        await b.pilot.press("ctrl+q")
        await b.until(lambda: isinstance(b.app.screen, Pick))
        await b.pilot.press("down", "enter")
        await b.until(lambda: not b.app.is_running)
    (folder,) = Path(form["save"]).iterdir()
    left = read_run(folder)
    assert left.status == "running" and left.process is not None
    handle = ProcessHandle(left.process.pid)
    reached = len(steps(folder))
    async with bench() as b:
        b.screen._open(folder)
        attached = b.screen.training
        assert attached is not None and attached.running and not attached.own
        # It has gone on alone, and still does.
        await b.until(lambda: (attached.history.iteration or 0) > reached + 2)
        await b.pilot.press("s")
        await b.until(lambda: attached.phase == "stopped")
        assert wait_all_gone([handle], DEADLINE_S)
        at = int(find(folder).name.removeprefix("iter_"))
        assert at == attached.history.iteration
        await b.pilot.press("r")
        await b.until(lambda: b.screen.page == "new")
        values = {**b.screen._form.values, "train_iters": str(at + 1)}
        await b.start(values, points=1)
        again = b.screen.training
        assert again is not None
        await b.until(lambda: not again.running)
        assert (again.phase, again.history.points[0].iteration) == ("finished", at + 1)
    handle.close()


async def test_a_run_whose_workbench_is_killed_stops_with_a_checkpoint(
    form: dict[str, str],
) -> None:
    endless = {**form, "train_iters": "1000000", "eval_iters": "0", "log_interval": "1"}
    async with bench() as b:
        await b.start(endless, points=2)
        run = b.screen.training
        assert run is not None and run.folder is not None and run._process is not None
        handle = ProcessHandle(run._process.pid)
        tie = run._process.stdin
        assert tie is not None
        # What the kernel does when a process is killed; by the file, which would close its number
        # again later, when it may be another's.
        tie.close()
        assert wait_all_gone([handle], DEADLINE_S)
        await b.until(lambda: run.phase == "stopped")
        assert read_run(run.folder).status == "stopped"
    handle.close()
