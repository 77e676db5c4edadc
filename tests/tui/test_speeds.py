"""Measured speeds, gathered from the updates of one engine after the other."""

from __future__ import annotations

import pytest

from engine.protocol import (
    PROTOCOL_VERSION,
    EngineReady,
    Event,
    EventEnvelope,
    Finished,
    Metrics,
    StageTelemetry,
    Started,
)
from tui.speeds import SpeedStore


def telemetry(layers: int, *, steps: int, step_s: float, head_s: float = 0.0) -> StageTelemetry:
    """After `steps` decode steps and as many prefilled rows of 1 ms."""
    return StageTelemetry(
        layers=layers,
        memory_bytes=1 << 20,
        memory_kind="process",
        busy_s=1.0,
        wait_s=0.0,
        steps=steps,
        rows=steps,
        decode_steps=steps,
        decode_busy_s=steps * step_s,
        decode_judge_s=steps * head_s,
        prefill_rows=steps,
        prefill_busy_s=steps * 0.001,
        device="cpu",
    )


class Engine:
    """One launch that tells a store what it does."""

    def __init__(self, store: SpeedStore, epoch: int, split: tuple[int, ...], **ready: str) -> None:
        self.store, self.epoch, self.split = store, epoch, split
        # The stages' first figures come before the engine is ready.
        for rank, layers in enumerate(split):
            self.tell(telemetry(layers, steps=0, step_s=0.0), rank)
        values = {"model": "tiny", "device": "cpu", "dtype": "float32", **ready}
        self.tell(
            EngineReady(
                stages=split,
                medusa_num_heads=0,
                tree_size=1,
                context_length=64,
                has_chat_template=True,
                **values,
            )
        )

    def tell(self, body: Event, rank: int = 0) -> None:
        self.store.on_update(EventEnvelope(PROTOCOL_VERSION, self.epoch, rank, body))

    def answer(self, steps: int, step_s: float, head_s: float, tokens_per_s: float) -> None:
        """An answer after which every stage has done `steps` steps altogether."""
        self.tell(Started(request_id="a", prompt_tokens=40, cached_tokens=8))
        for rank, layers in enumerate(self.split):
            last = rank == len(self.split) - 1
            extra = head_s if last else 0.0
            self.tell(telemetry(layers, steps=steps, step_s=step_s + extra, head_s=extra), rank)
        self.tell(
            Finished(
                request_id="a",
                finish_reason="stop",
                context_full=False,
                prompt_tokens=40,
                cached_tokens=8,
                completion_tokens=9,
                metrics=Metrics(ttft_s=0.2, tokens_per_s=tokens_per_s, mean_accepted_len=2.0),
            )
        )


def test_nothing_is_known_before_an_answer() -> None:
    store = SpeedStore()
    engine = Engine(store, 1, (3, 3))
    assert store.measured().stages == ()
    live = store.live()
    assert (live.step_s, live.ttft_s, live.token_s, live.prompt_rows) == ({}, None, None, None)
    assert list(live.telemetry) == [0, 1]
    engine.answer(10, 0.010, 0.004, tokens_per_s=50)
    assert store.live().prompt_rows == 32


def test_a_hop_is_what_a_step_takes_beyond_computing() -> None:
    store = SpeedStore()
    Engine(store, 1, (3, 3)).answer(10, 0.010, 0.004, tokens_per_s=50)
    measured, live = store.measured(), store.live()
    assert [stage.step_s for stage in measured.stages] == pytest.approx([0.010, 0.014])
    assert [stage.head_s for stage in measured.stages] == pytest.approx([0.0, 0.004])
    assert [stage.row_s for stage in measured.stages] == pytest.approx([0.001, 0.001])
    # Two tokens a step at 50 tokens/s: 40 ms a step, of which 24 ms are computing.
    assert measured.link_s == pytest.approx((0.040 - 0.024) / 2)
    assert (live.token_s, live.ttft_s, measured.tokens_per_step) == (0.02, 0.2, 2.0)


def test_the_latest_answer_counts_not_the_mean_of_all() -> None:
    store = SpeedStore()
    engine = Engine(store, 1, (6,))
    engine.answer(10, 0.010, 0.0, tokens_per_s=50)
    engine.tell(Started(request_id="b", prompt_tokens=9, cached_tokens=0))
    # Ten more steps that took 30 ms each.
    engine.tell(telemetry(6, steps=20, step_s=0.020))
    assert store.live().step_s[0] == pytest.approx(0.030)


def test_what_was_measured_outlives_a_new_split_until_that_is_measured() -> None:
    store = SpeedStore()
    Engine(store, 1, (3, 3)).answer(10, 0.010, 0.004, tokens_per_s=50)
    before = store.measured()
    one = Engine(store, 2, (6,))
    assert store.live().step_s == {}
    assert store.live().token_s is None
    assert store.measured() == before
    one.answer(10, 0.020, 0.004, tokens_per_s=80)
    after = store.measured()
    assert after.split == (6,)
    assert after.link_s == before.link_s  # one stage has no hops to measure


def test_another_model_voids_what_was_measured() -> None:
    store = SpeedStore()
    Engine(store, 1, (3, 3)).answer(10, 0.010, 0.004, tokens_per_s=50)
    Engine(store, 2, (3, 3), dtype="bfloat16")
    assert store.measured().stages == ()
