"""The stage editor as its user meets it, over an engine that the test plays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace
from textual.pilot import Pilot

from engine.client import Update
from engine.config import JupiterConfig, parse_config
from engine.errors import ConfigError, EngineError
from engine.protocol import Finished, Metrics, StageState, StageTelemetry, Started, Tokens
from tests.tui.fake_client import READY, FakeClient
from tui.app import JupiterApp
from tui.screens.stages import StagesScreen
from tui.widgets.draft_card import DraftCard, DraftCards
from tui.widgets.split_bar import SplitBar

DEADLINE_S = 10.0
GIB = 1 << 30
# Of the shape of SmolLM2-135M; for the sizes no weights are read.
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


class Bench:
    """An app that runs on a model of which only the description is there."""

    def __init__(self, folder: Path) -> None:
        self.clients: list[FakeClient] = []
        self.refuse: ConfigError | None = None
        self.file = folder / "jupiter.json"
        values = {
            "base_model_name_or_path": str(folder),
            "stage_num_hidden_layers_list": [15, 15],
            "temperature": 0,
        }
        self.file.write_text(json.dumps(values))
        (folder / "config.json").write_text(json.dumps(MODEL))
        config = parse_config(values, "a test")
        self.app = JupiterApp(config, self._make_client, config_given=str(self.file))
        self.pilot: Pilot[int]

    def _make_client(self, config: JupiterConfig, listener: Callable[[Update], None]) -> FakeClient:
        self.clients.append(FakeClient(config, listener))
        return self.clients[-1]

    async def check(self, config: JupiterConfig, on_message: Callable[[str], None]) -> Path:
        if self.refuse is not None:
            raise self.refuse
        return Path()

    @property
    def screen(self) -> StagesScreen:
        assert isinstance(self.app.screen, StagesScreen)
        return self.app.screen

    @property
    def split(self) -> tuple[int, ...]:
        return self.screen.draft.split

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                if self.app._exception is not None:
                    raise self.app._exception
                await self.pilot.pause(0)

    async def shows(self, *texts: str) -> None:
        """Wait until all of `texts` are on the screen."""
        for text in texts:
            await self.until(lambda text=text: text in self.shown())  # type: ignore[misc]

    async def columns(self, number: int) -> None:
        """Wait until there are so many columns."""
        await self.until(lambda: len(self.screen.query(DraftCard)) == number)

    def shown(self) -> str:
        screen = self.app.screen
        lines = screen._compositor.render_strips(screen.size)
        return "\n".join(strip.text.rstrip() for strip in lines)

    def line(self, label: str) -> str:
        """The line of the comparison that begins with `label`."""
        lines = self.shown().splitlines()
        return next(line for line in lines if line.strip().startswith(label))

    async def come_up(self, number: int) -> None:
        """The engine with this number gets ready and is to make a token."""
        await self.until(lambda: len(self.clients) == number)
        client = self.clients[-1]
        client.get_ready(replace(READY, stages=tuple(client.config.stage_num_hidden_layers_list)))
        await self.until(lambda: client.trials)

    async def healthy(self, number: int) -> None:
        """The engine with this number gets ready and makes its token."""
        if len(self.clients) < number or not self.clients[-1].trials:
            await self.come_up(number)
        trial = self.clients[-1].trials[-1]
        trial.put(Tokens(request_id="r1", token_ids=(3,), text="a"))
        trial.put(finished("r1"))

    def measure(self, *, kv_bytes: int = 0, total: int = 16 * GIB) -> None:
        """Telemetry of [15, 15] around one answer: 1 ms a layer and 4 ms for the heads."""
        client = self.clients[-1]
        for steps in (0, 10):
            for rank in (0, 1):
                head_s = 0.004 * rank
                client.event(
                    StageTelemetry(
                        layers=15,
                        memory_bytes=GIB // 2,
                        memory_kind="process",
                        busy_s=1.0,
                        wait_s=0.0,
                        steps=steps,
                        rows=steps,
                        decode_steps=steps,
                        decode_busy_s=steps * (0.015 + head_s),
                        decode_judge_s=steps * head_s,
                        prefill_rows=steps,
                        prefill_busy_s=steps * 0.0015,
                        kv_bytes=kv_bytes,
                        memory_total_bytes=total,
                        device="cpu",
                    ),
                    rank,
                )
            if not steps:
                client.event(Started(request_id="a", prompt_tokens=40, cached_tokens=8))
        client.event(finished("a"))


def finished(name: str) -> Finished:
    # One token in 36 ms, of which 34 ms are computing: 1 ms for each of the two hops.
    return Finished(
        request_id=name,
        finish_reason="length",
        context_full=False,
        prompt_tokens=40,
        cached_tokens=8,
        completion_tokens=1,
        metrics=Metrics(ttft_s=0.2, tokens_per_s=1 / 0.036, mean_accepted_len=1.0),
    )


@asynccontextmanager
async def editor(
    folder: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int] = (120, 36)
) -> AsyncIterator[Bench]:
    """The stage editor over a ready engine of [15, 15]."""
    folder.mkdir()
    bench = Bench(folder)
    monkeypatch.setattr("engine.prepare.prepare_model", bench.check)
    async with bench.app.run_test(size=size, notifications=True) as pilot:
        bench.pilot = pilot
        await bench.until(lambda: bench.clients)
        bench.clients[0].get_ready()
        await pilot.press("f3")
        await bench.until(lambda: isinstance(bench.app.screen, StagesScreen))
        await bench.until(lambda: bench.screen.snapshot.phase == "ready")
        await bench.shows("weights", "GiB")
        yield bench


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    async with editor(tmp_path / "model", monkeypatch) as bench:
        yield bench


async def test_keys_move_a_boundary_add_remove_even_out_and_revert(bench: Bench) -> None:
    for keys, split in (
        ("up", (16, 14)),
        ("pagedown", (11, 19)),
        ("right", (11, 19)),
        ("plus", (10, 20)),
        ("a", (10, 10, 10)),
        ("minus", (10, 11, 9)),
        ("e", (10, 10, 10)),
        ("d", (10, 20)),
        ("escape", (15, 15)),
    ):
        await bench.pilot.press(keys)
        assert bench.split == split, keys
        await bench.columns(len(split))


async def test_the_mouse_drags_a_boundary_and_chooses_a_stage(bench: Bench) -> None:
    bar = bench.screen.query_one(SplitBar)
    width = bar.content_size.width
    await bench.pilot.mouse_down(bar, offset=(1 + width // 2 - 1, 1))
    await bench.pilot.hover(bar, offset=(1 + width * 20 // 30 - 1, 1))
    await bench.until(lambda: bench.split == (20, 10))
    await bench.pilot.mouse_up(bar, offset=(1 + width * 20 // 30 - 1, 1))
    await bench.pilot.hover(bar, offset=(1 + width // 3, 1))
    assert bench.split == (20, 10)
    await bench.pilot.click(bar, offset=(width - 5, 1))
    assert bench.screen.draft.chosen == 1
    await bench.pilot.click(bench.screen.query(DraftCard).first())
    await bench.until(lambda: bench.screen.draft.chosen == 0)


async def test_memory_is_exact_and_times_are_unknown_until_measured(bench: Bench) -> None:
    # 15 layers of 3,540,096 numbers and the embedding of 28,311,552, in float32.
    await bench.shows("embedding", "norm · lm_head", "0.303 GiB", "ms per step")
    assert bench.line("first token").split()[-2:] == ["n/a", "n/a"]
    assert bench.line("per token").split()[-2:] == ["n/a", "n/a"]
    bench.measure()
    await bench.shows("15.0", "19.0", "36.0 ms", "200 ms", "first token, 32 new tokens")
    await bench.shows("process now", "0.500 GiB", "of 16.0 GiB")


async def test_a_draft_is_compared_with_live_before_it_is_applied(bench: Bench) -> None:
    bench.measure()
    await bench.shows("36.0 ms")
    await bench.pilot.press("up", "up")
    # The boundary's two layers take their weights, KV rows and time along.
    await bench.shows("17 layers", "+2", "≈17.0", "+2.0", "≈17.0", "−2.0")
    await bench.pilot.press("right", "a")
    await bench.shows("stage 2 · new", "layers only", "≈37.0 ms", "+1.0 ms")
    assert len(bench.clients) == 1  # nothing was changed by looking


async def test_what_does_not_fit_the_device_is_said(bench: Bench) -> None:
    bench.measure(total=GIB * 3 // 4)
    await bench.shows("of 0.750 GiB")
    assert "does not fit" not in bench.shown()
    per_sequence = bench.screen.facts().sizes.stages([15, 15])[0].kv_per_sequence
    bench.measure(total=GIB * 3 // 4, kv_bytes=4 * per_sequence)
    await bench.shows("does not fit")


async def test_apply_shows_its_phases_and_the_screen_stays_usable(bench: Bench) -> None:
    await bench.pilot.press("a", "enter")
    await bench.shows("● starting [8, 7, 15]")
    bench.clients[1].stage(0, StageState(phase="loading", num_layers=8, done=9, total=90))
    await bench.shows("10%")
    assert not bench.screen.check_action("apply", ())
    await bench.pilot.press("left", "up")  # a next draft meanwhile
    await bench.come_up(2)
    await bench.shows("✓ starting [8, 7, 15]", "● trying the engine on one token")
    await bench.healthy(2)
    await bench.shows("✓ The engine runs 8|7|15")
    assert bench.app.session.config.stage_num_hidden_layers_list == [8, 7, 15]
    assert bench.screen.draft.live == (8, 7, 15)
    assert bench.split == (9, 6, 15)
    assert bench.screen.check_action("apply", ())


async def test_a_failed_apply_is_rolled_back_with_its_reason_and_the_draft_stays(
    bench: Bench,
) -> None:
    await bench.pilot.press("a", "enter")
    await bench.until(lambda: len(bench.clients) == 2)
    bench.clients[1].fail_start(EngineError("stage 2: out of [memory]\nlog line"))
    await bench.healthy(3)
    await bench.shows("✗ [8, 7, 15] did not come up: stage 2: out of [memory]; the engine is back")
    assert (bench.split, bench.screen.draft.live) == ((8, 7, 15), (15, 15))
    await bench.pilot.press("escape")
    await bench.shows("drag a boundary")


async def test_a_draft_that_the_check_refuses_leaves_the_engine_alone(bench: Bench) -> None:
    bench.refuse = ConfigError("key 'stage_num_hidden_layers_list': too many")
    await bench.pilot.press("up", "enter")
    await bench.shows("✗ key 'stage_num_hidden_layers_list': too many")
    assert (len(bench.clients), bench.clients[0].stops) == (1, 0)
    assert bench.screen.snapshot.phase == "ready"


async def test_save_writes_the_draft_to_the_config_in_use(bench: Bench) -> None:
    await bench.pilot.press("a", "s")
    await bench.shows("Saved", "8|7|15 is now the split")
    saved = json.loads(bench.file.read_text())
    assert saved["stage_num_hidden_layers_list"] == [8, 7, 15]
    assert list(saved)[-1] == "temperature"
    bench.file.unlink()
    await bench.pilot.press("s")
    await bench.shows("Not saved", "no such config")


async def test_the_palette_and_the_keys_offer_only_what_is_possible(bench: Bench) -> None:
    def offered() -> set[str]:
        return {command.title for command in bench.app.get_system_commands(bench.screen)}

    assert not {"Apply", "Revert", "Even"} & offered()
    assert {"Add", "Remove", "Save"} <= offered()
    await bench.pilot.press("up")
    assert {"Apply", "Revert", "Even"} <= offered()
    await bench.pilot.press("escape", "d")
    assert bench.split == (30,)
    assert "Remove" not in offered()


@pytest.mark.parametrize("size", [(80, 24), (120, 36), (200, 60)])
async def test_every_part_is_on_the_screen_at_every_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    async with editor(tmp_path / "model", monkeypatch, size) as bench:
        bench.measure()
        await bench.pilot.press("up", "right", "a", "a", "a")
        await bench.columns(5)
        await bench.shows("≈", "live 15|15", "drag a boundary", "Apply", "palette")
        await bench.until(lambda: len(bench.shown().splitlines()) == size[1])
        assert max(map(len, bench.shown().splitlines())) <= size[0]
        cards = bench.screen.query_one(DraftCards)
        chosen = list(bench.screen.query(DraftCard))[bench.screen.draft.chosen]
        await bench.until(lambda: chosen.region in cards.region)
        for label in ("memory on cpu", "first token", "per token"):
            assert bench.line(label)
