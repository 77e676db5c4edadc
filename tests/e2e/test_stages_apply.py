"""The stage editor on live stages: what it applies runs, and holds what was predicted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
import pytest
from textual.pilot import Pilot

from engine.config import load_config
from engine.protocol import Message, SamplingParams, Tokens
from tests.tiny import tiny_folder
from tui.app import JupiterApp
from tui.metrics import UNKNOWN
from tui.screens.stages import StagesScreen
from tui.stage_view import comparison

PATIENCE_S = 90.0


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "state"))
    values = {
        "base_model_name_or_path": str(tiny_folder()),
        "stage_num_hidden_layers_list": [3, 3],
        "device": "cpu",
        "num_threads": 1,
        "temperature": 0,
        "max_kv_cache_length": 256,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return path


class Editor:
    """The stage editor over a live engine."""

    def __init__(self, app: JupiterApp, pilot: Pilot[int]) -> None:
        self.app, self.pilot = app, pilot

    @property
    def screen(self) -> StagesScreen:
        assert isinstance(self.app.screen, StagesScreen)
        return self.app.screen

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                if self.app._exception is not None:
                    raise self.app._exception
                await self.pilot.pause(0.02)

    async def ask(self) -> list[int]:
        """One greedy answer."""
        tokens: list[int] = []
        params = SamplingParams(temperature=0, max_tokens=24)
        async for event in self.app.session.ask([Message("user", "hello there")], params=params):
            if isinstance(event, Tokens):
                tokens += event.token_ids
        return tokens

    async def apply(self) -> None:
        """Apply the draft and wait until that is over."""
        await self.pilot.press("enter")
        # Layers that only change hands do so in an instant: the phase may not be seen.
        await self.until(lambda: not self.screen.draft.changed and self.is_settled())

    def is_settled(self) -> bool:
        """Ready, and every stage of the split has been heard."""
        live = self.screen.facts().live.telemetry
        ready = self.app.session.snapshot.phase == "ready"
        return ready and len(live) == len(self.screen.draft.split)

    async def holds_what_was_predicted(self) -> None:
        """Wait until the stages' figures are those of the split."""
        await self.until(lambda: self.held() == self.predicted())

    def predicted(self) -> list[tuple[int, int, int]]:
        facts = self.screen.facts()
        assert facts.sizes is not None
        sizes = facts.sizes.stages(self.screen.draft.live)
        return [(size.num_layers, size.weights, size.kv()) for size in sizes]

    def held(self) -> list[tuple[int, int, int]]:
        live = self.screen.facts().live.telemetry.values()
        return [(stage.layers, stage.weights_bytes, stage.kv_bytes) for stage in live]


@asynccontextmanager
async def open_editor(path: Path) -> AsyncIterator[Editor]:
    app = JupiterApp(load_config(str(path)), config_given=str(path))
    async with app.run_test(size=(120, 36)) as pilot:
        editor = Editor(app, pilot)
        try:
            await pilot.press("f3")
            await editor.until(lambda: app.session.snapshot.phase == "ready")
            await editor.until(editor.is_settled)
            await editor.until(lambda: editor.screen.facts().sizes)
            yield editor
        finally:
            await app.leave(0)
    assert not psutil.Process().children(recursive=True)


async def test_another_boundary_and_another_world_size_are_applied_and_measured(
    config_file: Path,
) -> None:
    async with open_editor(config_file) as editor:
        await editor.holds_what_was_predicted()
        first = await editor.ask()
        await editor.until(lambda: len(editor.screen.facts().live.step_s) == 2)
        before = editor.screen.facts()
        assert before.measured.link_s is not None
        timing = before.predict((4, 2))
        assert None not in (timing.token_s, timing.ttft_s)

        await editor.pilot.press("up")
        assert editor.screen.draft.split == (4, 2)
        await editor.apply()
        assert editor.app.session.config.stage_num_hidden_layers_list == [4, 2]
        await editor.holds_what_was_predicted()
        # Nothing was measured of this engine yet; what was of the one before still predicts.
        assert {line.live for line in comparison(editor.screen.facts())[1:]} == {UNKNOWN}
        assert editor.screen.facts().measured.split == (3, 3)

        await editor.pilot.press("a")
        assert editor.screen.draft.split == (2, 2, 2)
        await editor.apply()
        await editor.holds_what_was_predicted()
        assert await editor.ask() == first
        await editor.until(lambda: editor.screen.facts().measured.split == (2, 2, 2))
        assert UNKNOWN not in {line.live for line in comparison(editor.screen.facts())}

        await editor.pilot.press("s")
        assert json.loads(config_file.read_text())["stage_num_hidden_layers_list"] == [2, 2, 2]


async def test_a_split_that_does_not_come_up_is_rolled_back_and_told(config_file: Path) -> None:
    async with open_editor(config_file) as editor:
        first = await editor.ask()
        session = editor.app.session
        unlisten = session.add_listener(kill_third_stage)
        await editor.pilot.press("a", "enter")
        await editor.until(lambda: session.snapshot.phase == "applying")
        await editor.until(lambda: session.snapshot.phase == "ready")
        unlisten()
        await editor.until(lambda: "back on [3, 3]" in shown(editor.app))
        assert session.config.stage_num_hidden_layers_list == [3, 3]
        assert editor.screen.draft.split == (2, 1, 3)
        assert editor.screen.draft.live == (3, 3)
        assert await editor.ask() == first


def kill_third_stage(update: object) -> None:
    """Have the third stage of a launch die as soon as it tells its process id."""
    body = getattr(update, "body", None)
    if getattr(update, "rank", 0) == 2 and getattr(body, "pid", 0):
        with suppress(psutil.NoSuchProcess):
            psutil.Process(body.pid).kill()


def shown(app: JupiterApp) -> str:
    """The text on the screen."""
    lines = app.screen._compositor.render_strips(app.screen.size)
    return "\n".join(strip.text for strip in lines)
