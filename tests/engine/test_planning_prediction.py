"""Times of a split from measured times: what adds up, what overlaps, and what stays unknown."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.planning import Measured, StageSpeed, Timing
from engine.planning import predict as predict_with
from engine.planning.prediction import makespan, prefill_chunks

LAYER_S, HEAD_S, LINK_S, ROW_S = 0.001, 0.004, 0.0005, 0.0001


def speeds(split: Sequence[int], devices: Sequence[str] = ()) -> tuple[StageSpeed, ...]:
    """Stages whose layers are all alike; the last one has the heads."""
    return tuple(
        StageSpeed(
            layers,
            devices[rank] if devices else "cpu",
            step_s=layers * LAYER_S + (HEAD_S if rank == len(split) - 1 else 0),
            head_s=HEAD_S if rank == len(split) - 1 else 0,
            row_s=layers * ROW_S,
        )
        for rank, layers in enumerate(split)
    )


def measured(split: Sequence[int], devices: Sequence[str] = ()) -> Measured:
    return Measured(speeds(split, devices), LINK_S, tokens_per_step=2.0, prompt_rows=100)


def predict(split: Sequence[int], known: Measured) -> Timing:
    return predict_with(split, known, num_sub_sequences=5, max_sub_sequence_len=128)


def test_a_stage_takes_its_layers_times_the_time_of_a_layer_and_the_last_its_heads() -> None:
    steps = predict((10, 8, 12), measured((15, 15))).steps
    assert steps == pytest.approx((0.010, 0.008, 0.012 + HEAD_S))


def test_a_token_takes_all_stages_and_all_hops_shared_by_the_tokens_of_a_step() -> None:
    known = measured((15, 15))
    computing = 30 * LAYER_S + HEAD_S
    assert predict((15, 15), known).token_s == pytest.approx((computing + 2 * LINK_S) / 2)
    assert predict((10, 10, 10), known).token_s == pytest.approx((computing + 3 * LINK_S) / 2)
    assert predict((30,), known).token_s == pytest.approx(computing / 2)


def test_what_was_not_measured_is_not_predicted() -> None:
    assert predict((15, 15), Measured()) == Timing((None, None), None, None)
    one_stage = Measured(speeds((30,)), None, tokens_per_step=1.0, prompt_rows=100)
    split = predict((15, 15), one_stage)
    assert split.steps == pytest.approx((0.015, 0.015 + HEAD_S))
    assert (split.token_s, split.ttft_s) == (None, None)  # nothing is known of hops
    assert None not in (predict((30,), one_stage).token_s, predict((30,), one_stage).ttft_s)
    no_prompt = Measured(speeds((15, 15)), LINK_S, tokens_per_step=1.0)
    assert predict((10, 20), no_prompt).ttft_s is None


def test_each_device_has_its_own_speed_and_a_new_stage_elsewhere_none() -> None:
    fast = StageSpeed(15, "cuda:0", step_s=0.015, row_s=0.0015)
    slow = StageSpeed(15, "cuda:1", step_s=0.034, head_s=0.004, row_s=0.0030)
    known = Measured((fast, slow), LINK_S, tokens_per_step=1.0, prompt_rows=100)
    assert predict((20, 10), known).steps == pytest.approx((0.020, 0.024))
    # Where a third stage would run cannot be known, nor the heads' time there.
    assert predict((10, 10, 10), known).steps == (pytest.approx(0.010), pytest.approx(0.020), None)
    assert predict((10, 10, 10), known).token_s is None
    # One stage would be on the first device, whose time for the heads was not measured.
    assert predict((30,), known).steps == (None,)


def test_chunks_are_those_of_the_scheduler() -> None:
    assert prefill_chunks(100, 2, 5, 128) == [32, 32, 32, 4]
    assert prefill_chunks(1000, 2, 5, 128) == [128] * 7 + [104]
    assert prefill_chunks(500, 3, 5, 128) == [100] * 5
    assert prefill_chunks(300, 1, 5, 128) == [128, 128, 44]
    assert prefill_chunks(20, 2, 5, 128) == [20]


def test_chunks_overlap_on_devices_of_their_own_and_take_turns_on_a_shared_one() -> None:
    # Three chunks of one row through two stages of one second: the pipeline needs four seconds.
    assert makespan([1.0, 1.0], [1, 1, 1]) == 4.0
    assert makespan([1.0, 1.0], [1, 1, 1], ["a", "a"]) == 6.0
    # The slowest stage rules.
    assert makespan([1.0, 3.0], [1, 1, 1]) == 10.0
    assert makespan([1.0, 3.0, 1.0], [1, 1], ["a", "b", "a"]) == 8.0


def test_on_devices_of_their_own_more_stages_bring_the_first_token_earlier() -> None:
    devices = ("cuda:0", "cuda:1")
    known = measured((15, 15), devices)
    even, uneven = predict((15, 15), known).ttft_s, predict((25, 5), known).ttft_s
    work = [15 * ROW_S, 15 * ROW_S]
    expected = makespan(work, [32, 32, 32, 4]) + HEAD_S + 2 * LINK_S
    assert even == pytest.approx(expected)
    assert uneven is not None and even is not None and uneven > even


def test_on_one_shared_device_the_first_token_takes_as_long_with_any_split() -> None:
    known = measured((15, 15))
    times = [predict(split, known).ttft_s for split in ((30,), (15, 15), (5, 25), (10, 10, 10))]
    links = [0, 2 * LINK_S, 2 * LINK_S, 3 * LINK_S]
    computing = [t - link for t, link in zip(times, links, strict=True) if t is not None]
    assert computing == pytest.approx([computing[0]] * 4)
    # Two stages at once had half of the device each, so that alone a row takes less.
    assert computing[0] < 100 * 30 * ROW_S + HEAD_S
