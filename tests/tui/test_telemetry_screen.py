"""The telemetry screen under a pilot: live figures, pause, stale and lost stages, logs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from engine.protocol import PROTOCOL_VERSION, EventEnvelope, StageState, Started, Tokens
from tests.tui.chat import Chat, open_chat
from tests.tui.fake_client import READY
from tests.tui.test_telemetry import finished, sample
from tui.screens.log import LogScreen
from tui.screens.telemetry import TelemetryScreen
from tui.telemetry import STALE_S, TelemetryStore
from tui.widgets.history import History
from tui.widgets.stage_card import (
    LINK_ERROR,
    LINK_WARNING,
    MEMORY_ERROR,
    MEMORY_WARNING,
    WAIT_WARNING,
    StageCard,
    memory_style,
    share_style,
    size,
)

GIB = 1 << 30
FIRST = {"device": "cpu", "device_name": "A Processor", "memory_bytes": GIB}


class Telemetry:
    """The screen, the chat below it whose client the test plays, and the store's clock."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.now = 1000.0
        store = TelemetryStore(lambda: self.now)
        chat.app.session.add_listener(store.on_update)
        chat.app.telemetry = store

    @property
    def screen(self) -> TelemetryScreen:
        assert isinstance(self.chat.app.screen, TelemetryScreen)
        return self.chat.app.screen

    def cards(self) -> list[StageCard]:
        return list(self.screen.query(StageCard))

    def measure(self, rank: int, second: int, **figures: int) -> None:
        """The figures of a stage after so many seconds, half of them busy."""
        more = {"memory_total_bytes": 8 * GIB, **FIRST, **figures}
        spent = {"busy_s": 0.5 * second, "wait_s": 0.25 * second, "idle_s": 0.25 * second}
        self.chat.client.event(sample(**more, **spent, rows=10 * second), rank)

    async def press(self, *keys: str) -> None:
        await self.chat.pilot.press(*keys)

    async def shows(self, text: str) -> None:
        await self.chat.shows(text)


@asynccontextmanager
async def open_telemetry(terminal: tuple[int, int] = (80, 24)) -> AsyncIterator[Telemetry]:
    async with open_chat(size=terminal) as chat:
        telemetry = Telemetry(chat)
        for rank in (0, 1):
            chat.client.stage(rank, StageState(phase="ready", num_layers=15, pid=40 + rank))
        await chat.ready()
        for second in (0, 1):
            for rank in (0, 1):
                telemetry.measure(rank, second)
        await chat.pilot.press("f4")
        await chat.shows("stage 1")
        yield telemetry


@pytest.mark.parametrize("terminal", [(80, 24), (120, 36), (200, 60)])
async def test_every_stage_is_shown_with_its_figures(terminal: tuple[int, int]) -> None:
    async with open_telemetry(terminal) as telemetry:
        await telemetry.shows("layers 15–29")
        for text in (
            "stage 0  layers 0–14  cpu · A Processor",
            "process memory",
            "1.00 GiB of 8.00 GiB",
            "busy 50%",
            "waiting 25%",
            "idle 25%",
            "n/a/step",
            "ready · ",
        ):
            await telemetry.shows(text)
        lines = telemetry.chat.shown().splitlines()
        assert max(map(len, lines)) <= terminal[0]
        assert not [line for line in lines[1:] if "…" in line]  # the title gives way


async def test_device_memory_is_called_what_it_is() -> None:
    async with open_telemetry() as telemetry:
        figures = {"memory_kind": "device", "device": "cuda:0", "device_name": "A GPU"}
        telemetry.chat.client.event(sample(**figures, memory_bytes=GIB), 0)
        await telemetry.shows("device memory")
        await telemetry.shows("cuda:0 · A GPU")


async def test_a_pause_freezes_the_view_and_not_the_collection() -> None:
    async with open_telemetry() as telemetry:
        await telemetry.shows("busy 50%")
        await telemetry.press("space")
        await telemetry.shows("paused for")
        telemetry.now += 30
        telemetry.measure(0, 9, memory_bytes=3 * GIB)
        await telemetry.shows("paused for 30.0 s, still collecting")
        assert "3.00 GiB" not in telemetry.chat.shown()
        assert "stale" not in telemetry.chat.shown()
        await telemetry.press("space")
        await telemetry.shows("3.00 GiB")
        assert "paused" not in telemetry.chat.shown()
        assert len(telemetry.screen._view.stages[0].past) == 2


async def test_a_stage_that_falls_silent_is_stale_and_its_shares_unknown() -> None:
    async with open_telemetry() as telemetry:
        telemetry.now += STALE_S + 1
        telemetry.measure(0, 2)
        await telemetry.shows("stale: last heard 2.50 s ago")
        first, second = telemetry.cards()
        assert not first.has_class("-stale") and second.has_class("-stale")
        assert "1.00 GiB" in str(second.render())
        assert "busy 50%" not in str(second.render())


async def test_a_dead_engine_is_shown_as_disconnected_with_its_reason() -> None:
    async with open_telemetry((120, 36)) as telemetry:
        telemetry.chat.client.die("rank 1 was killed by SIGKILL\nmore about it")
        await telemetry.shows("dead: rank 1 was killed by SIGKILL")
        await telemetry.shows("disconnected")
        assert all(card.has_class("-lost") for card in telemetry.cards())
        assert "more about it" not in telemetry.chat.shown()


async def test_the_histories_draw_rates_and_first_tokens() -> None:
    async with open_telemetry((120, 36)) as telemetry:
        client = telemetry.chat.client
        await telemetry.shows("first token  n/a")
        client.event(Started(request_id="r1", prompt_tokens=3, cached_tokens=0))
        await telemetry.shows("1 running · 0 finished")
        for _ in range(4):
            telemetry.now += 0.5
            client.event(Tokens(request_id="r1", token_ids=(1,) * 12, text=""))
        telemetry.now += 0.5
        await telemetry.shows("tokens/s  24.0")
        client.event(finished(ttft_s=0.25))
        await telemetry.shows("first token  0.25 s   median 0.25 s")
        await telemetry.shows("0 running · 1 finished · 48 tokens")
        rates, firsts = telemetry.screen.query(History)
        assert any("⣿" in line for line in str(rates.render()).splitlines())
        assert str(firsts.render()).splitlines()[-2].endswith("█")


async def test_a_stage_is_chosen_with_the_arrows_and_its_log_is_one_key_away(
    tmp_path: Path,
) -> None:
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    for rank, log in enumerate(logs):
        log.write_text(f"this is rank {rank}\n")
    async with open_telemetry() as telemetry:
        telemetry.chat.client.log_path = logs.__getitem__  # type: ignore[method-assign]
        assert telemetry.cards()[0].has_focus
        await telemetry.press("down", "enter")
        await telemetry.shows("this is rank 1")
        assert isinstance(telemetry.chat.app.screen, LogScreen)
        await telemetry.press("escape")
        await telemetry.chat.until(lambda: telemetry.cards()[1].has_focus)
        await telemetry.press("0")
        await telemetry.shows("this is rank 0")
        await telemetry.press("escape", "9")
        await telemetry.shows("stage 0  layers")


async def test_a_click_on_log_opens_it(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("words of a stage\n")
    async with open_telemetry() as telemetry:
        telemetry.chat.client.log_path = lambda rank: tmp_path / "log"  # type: ignore[method-assign]
        card = telemetry.cards()[0]
        assert await telemetry.chat.pilot.click(card, offset=(card.size.width - 2, 0))
        await telemetry.shows("words of a stage")


async def test_another_split_brings_other_cards() -> None:
    async with open_telemetry((120, 36)) as telemetry:
        client = telemetry.chat.client
        client.event(msgspec.structs.replace(READY, stages=(10, 10, 10)))
        await telemetry.shows("stage 2  layers 20–29")
        client.event(sample(), 2)
        client.tell(EventEnvelope(PROTOCOL_VERSION, 2, 0, StageState(phase="ready", num_layers=30)))
        client.tell(
            EventEnvelope(PROTOCOL_VERSION, 2, 0, msgspec.structs.replace(READY, stages=(30,)))
        )
        await telemetry.shows("layers 0–29")
        await telemetry.chat.until(lambda: len(telemetry.cards()) == 1)


@pytest.mark.parametrize(
    ("share", "style"), [(0.1, "$success"), (0.75, "$text-warning"), (0.9, "$text-error")]
)
def test_memory_has_the_colour_that_the_help_states(share: float, style: str) -> None:
    assert memory_style(share) == style
    for limit in (MEMORY_WARNING, MEMORY_ERROR, WAIT_WARNING, LINK_WARNING, LINK_ERROR):
        assert f"{limit:.0%}" in TelemetryScreen.HELP


def test_only_much_waiting_and_a_slow_link_are_coloured() -> None:
    assert share_style("busy", 1.0) == share_style("idle", 1.0) == share_style("wait", 0.84) == ""
    assert share_style("wait", 0.85) == "$text-warning"
    assert [share_style("link", share) for share in (0.09, 0.1, 0.25)] == [
        "",
        "$text-warning",
        "$text-error",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "n/a"), (120_000, "0.11 MiB"), (432 << 20, "432 MiB"), (1 << 30, "1.00 GiB")],
)
def test_sizes_are_written_for_people(value: int | None, text: str) -> None:
    assert size(value) == text
