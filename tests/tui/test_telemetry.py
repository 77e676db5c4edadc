"""The telemetry store: shares of spans, histories, staleness, launches one after another."""

from __future__ import annotations

from typing import Any

import pytest

from engine.protocol import (
    PROTOCOL_VERSION,
    EngineReady,
    Event,
    EventEnvelope,
    Failed,
    Finished,
    Metrics,
    StageState,
    StageTelemetry,
    Started,
    Tokens,
)
from engine.updates import ClientState, StateChanged
from tests.tui.fake_client import READY
from tui.telemetry import BUCKET_S, HISTORY, STALE_S, Shares, TelemetryStore
from tui.telemetry_json import stage_json
from tui.widgets.stage_card import card


class Engine:
    """A store on a clock of its own, and the updates that a client would give it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.epoch = 1
        self.store = TelemetryStore(lambda: self.now)

    def event(self, body: Event, rank: int = 0) -> None:
        self.store.on_update(EventEnvelope(PROTOCOL_VERSION, self.epoch, rank, body))

    def state(self, state: ClientState, reason: str = "") -> None:
        self.store.on_update(StateChanged(state, reason))

    def ready(self, ready: EngineReady = READY) -> None:
        self.event(ready)
        self.state(ClientState.READY)

    def tokens(self, count: int) -> None:
        self.event(Tokens(request_id="r1", token_ids=(7,) * count, text=""))

    def finish(self, ttft_s: float | None, request_id: str = "r1") -> None:
        self.event(finished(ttft_s, request_id))


def finished(ttft_s: float | None, request_id: str = "r1") -> Finished:
    return Finished(
        request_id=request_id,
        finish_reason="stop",
        context_full=False,
        prompt_tokens=3,
        cached_tokens=0,
        completion_tokens=2,
        metrics=Metrics(ttft_s=ttft_s),
    )


def sample(**figures: Any) -> StageTelemetry:
    base = {"layers": 15, "memory_bytes": 300, "memory_kind": "process", "memory_total_bytes": 1000}
    counters = {"busy_s": 0.0, "wait_s": 0.0, "steps": 0, "rows": 0}
    return StageTelemetry(**{**base, **counters, **figures})


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_nothing_is_known_before_anything_was_measured(engine: Engine) -> None:
    view = engine.store.view((15, 15))
    assert view.state == "starting"
    assert view.tokens_per_s is None and view.ttft_s is None
    first, second = view.stages
    assert (second.first_layer, second.layers) == (15, 15)
    assert first.contact == "waiting" and first.sample is None and first.shares is None


def test_shares_are_those_of_the_time_between_the_last_two_samples(engine: Engine) -> None:
    engine.ready()
    engine.event(sample(busy_s=10.0, wait_s=5.0, link_s=1.0, idle_s=4.0, rows=100, steps=10))
    assert engine.store.view().stages[0].shares is None
    engine.event(sample(busy_s=10.4, wait_s=5.3, link_s=1.1, idle_s=4.2, rows=150, steps=20))
    stage = engine.store.view().stages[0]
    assert stage.shares is not None
    assert stage.shares.busy == pytest.approx(0.4)
    assert stage.shares.wait == pytest.approx(0.3)
    assert stage.shares.link == pytest.approx(0.1)
    assert stage.shares.idle == pytest.approx(0.2)
    assert stage.rows_per_s == pytest.approx(50)
    assert stage.link_step_ms == pytest.approx(10)
    assert stage.past == (stage.shares,)
    assert stage.memory_share == pytest.approx(0.3)


def test_a_hop_is_told_by_its_bytes_and_their_form(engine: Engine) -> None:
    engine.event(sample(steps=10, sent_bytes=5_000, link_dtype="int8"))
    engine.event(sample(busy_s=0.5, steps=20, sent_bytes=95_000, link_dtype="int8"))
    stage = engine.store.view().stages[0]
    assert stage.link_step_bytes == pytest.approx(9_000)
    assert ", 8.8 KiB int8 " in card(stage, 140).plain
    told = stage_json(stage)
    assert (told["link_dtype"], told["link_step_bytes"]) == ("int8", 9_000)


def test_one_stage_has_no_hop(engine: Engine) -> None:
    engine.event(sample(steps=10))
    engine.event(sample(busy_s=0.5, steps=20))
    stage = engine.store.view().stages[0]
    assert stage.link_step_bytes is None
    assert stage_json(stage)["link_dtype"] is None


def test_the_time_of_a_step_is_of_the_last_sample_that_had_steps(engine: Engine) -> None:
    engine.event(sample())
    engine.event(sample(busy_s=0.5, decode_steps=10, decode_busy_s=0.2))
    engine.event(sample(busy_s=0.6, idle_s=0.4, decode_steps=10, decode_busy_s=0.2))
    stage = engine.store.view().stages[0]
    assert stage.decode_step_ms == pytest.approx(20)
    assert stage.prefill_tokens_per_s is None
    engine.event(sample(busy_s=0.9, idle_s=0.4, prefill_rows=64, prefill_busy_s=0.25))
    assert engine.store.view().stages[0].prefill_tokens_per_s == pytest.approx(256)


def test_a_stage_that_is_not_heard_becomes_stale_and_fresh_again(engine: Engine) -> None:
    engine.ready()
    engine.event(sample())
    engine.event(sample(busy_s=0.5))
    assert engine.store.view().stages[0].contact == "live"
    engine.now += STALE_S + 0.1
    stage = engine.store.view().stages[0]
    assert stage.contact == "stale"
    assert stage.age_s == pytest.approx(STALE_S + 0.1)
    assert stage.shares is None and stage.rows_per_s is None
    assert stage.sample is not None
    engine.event(sample(busy_s=1.0))
    assert engine.store.view().stages[0].contact == "live"


def test_the_stages_of_an_engine_that_died_are_disconnected(engine: Engine) -> None:
    engine.ready()
    engine.event(sample())
    engine.state(ClientState.DEAD, "rank 0 was killed")
    view = engine.store.view()
    assert (view.state, view.reason) == ("dead", "rank 0 was killed")
    assert [stage.contact for stage in view.stages] == ["disconnected"] * 2
    assert view.running == 0 and view.tokens_per_s is None


def test_a_stage_that_has_said_farewell_is_disconnected(engine: Engine) -> None:
    engine.ready()
    engine.event(sample(), rank=1)
    engine.event(StageState(phase="stopped", pid=7), rank=1)
    assert engine.store.view().stages[1].contact == "disconnected"


def test_tokens_per_second_are_counted_in_spans(engine: Engine) -> None:
    engine.ready()
    engine.now += BUCKET_S
    for count in (10, 20, 0, 30):
        engine.tokens(count)
        engine.now += BUCKET_S
    view = engine.store.view()
    assert view.token_rates[-4:] == (20.0, 40.0, 0.0, 60.0)
    assert view.tokens_per_s == pytest.approx(30.0)
    assert view.tokens == 60
    engine.now += 100 * BUCKET_S
    assert engine.store.view().tokens_per_s == 0.0


def test_a_time_without_an_engine_is_a_gap_and_not_a_zero(engine: Engine) -> None:
    engine.ready()
    engine.now += 2 * BUCKET_S
    engine.state(ClientState.DEAD, "gone")
    engine.now += 3 * BUCKET_S
    assert engine.store.view().token_rates[-5:] == (0.0, 0.0, None, None, None)


def test_a_history_does_not_grow_without_end(engine: Engine) -> None:
    engine.ready()
    engine.tokens(5)
    engine.now += 1e6
    assert len(engine.store.view().token_rates) == HISTORY
    for n in range(2 * HISTORY):
        engine.event(sample(busy_s=float(n)))
    assert engine.store.view().stages[0].past == (Shares(1.0, 0.0, 0.0, 0.0),) * HISTORY


def test_requests_and_their_first_tokens_are_followed(engine: Engine) -> None:
    engine.ready()
    for name in ("r1", "r2", "r3"):
        engine.event(Started(request_id=name, prompt_tokens=3, cached_tokens=0))
    assert engine.store.view().running == 3
    engine.finish(0.2)
    engine.finish(None, "r2")  # cancelled before its first token
    engine.event(Failed(request_id="r3", message="no", code="internal_error"))
    engine.finish(0.6, "r4")
    view = engine.store.view()
    assert (view.running, view.finished) == (0, 4)
    assert view.ttfts_s == (0.2, 0.6)
    assert (view.ttft_s, view.ttft_median_s) == (0.6, pytest.approx(0.4))


def test_a_new_launch_forgets_the_stages_and_keeps_the_histories(engine: Engine) -> None:
    engine.ready()
    engine.event(sample(), rank=1)
    engine.finish(0.2)
    engine.now += BUCKET_S
    engine.state(ClientState.DEAD, "gone")
    engine.epoch = 2
    engine.event(StageState(phase="loading", num_layers=30, done=1, total=9, pid=5))
    view = engine.store.view((30,))
    assert (view.state, view.reason, view.model) == ("starting", "", None)
    assert [(s.phase, s.pid, s.contact) for s in view.stages] == [("loading", 5, "waiting")]
    assert view.finished == 0 and view.ttfts_s == (0.2,) and view.token_rates
    engine.epoch = 1
    engine.event(sample(), rank=1)  # late: of the launch before
    assert len(engine.store.view((30,)).stages) == 1


def test_an_old_view_does_not_change(engine: Engine) -> None:
    engine.ready()
    engine.event(sample())
    before = engine.store.view()
    copy = repr(before)
    engine.event(sample(busy_s=1.0))
    engine.tokens(3)
    engine.now += 10
    engine.store.view()
    assert repr(before) == copy
