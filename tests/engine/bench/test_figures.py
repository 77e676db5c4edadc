"""What runs come to, and how engines compare."""

from __future__ import annotations

import pytest

from engine.bench.figures import (
    BFLOAT16,
    F16,
    FLOAT32,
    OURS,
    PLAIN,
    PLAYERS,
    RATIOS,
    TWO_STAGES,
    Figures,
    Run,
    figures,
    ratios,
    run_of,
    table,
)


def rate(tokens_per_s: float | None) -> Figures:
    return Figures(tokens_per_s, 1.0, 1.0, 1.0)


def test_tokens_of_the_first_arrival_are_not_counted_as_decoded() -> None:
    run = run_of([5, 6, 7, 8, 9], [0.5, 0.75, 1.0], first=1)
    assert (run.ttft_s, run.decode_tokens, run.decode_s, run.steps) == (0.5, 4, 0.5, 2)


def test_a_long_answer_counts_for_more_than_a_short_one() -> None:
    long = Run(tokens=(1,) * 101, ttft_s=0.1, decode_tokens=100, decode_s=1.0, steps=50)
    short = Run(tokens=(1,) * 11, ttft_s=0.3, decode_tokens=10, decode_s=1.0, steps=5)
    found = figures([long, short])
    assert found.tokens_per_s == 55
    assert found.tokens_per_step == 2
    assert found.ms_per_step == pytest.approx(2000 / 55)


def test_time_to_first_token_is_the_median() -> None:
    runs = [Run((1,), ttft, 1, 1.0, 1) for ttft in (0.1, 9.0, 0.2, 0.4)]
    assert figures(runs[:3]).ttft_ms == pytest.approx(200)
    assert figures(runs).ttft_ms == pytest.approx(300)


def test_an_answer_of_one_token_gives_no_rate() -> None:
    found = figures([Run((1,), 0.1, 0, 0.0, 0)])
    assert found == Figures(None, None, None, 100.0)
    assert figures([]) == Figures(None, None, None, None)


def test_the_fastest_plain_dtype_of_transformers_is_the_one_compared_to() -> None:
    found, _ = ratios({OURS: rate(100), FLOAT32: rate(20), BFLOAT16: rate(25)}, {})
    assert found["vs_transformers"] == 4
    found, _ = ratios({OURS: rate(100), FLOAT32: rate(20)}, {BFLOAT16: "broken"})
    assert found["vs_transformers"] == 5


def test_two_stages_are_compared_to_one() -> None:
    found, _ = ratios({OURS: rate(100), TWO_STAGES: rate(90), PLAIN: rate(50)}, {})
    assert found["world2_vs_world1"] == 0.9
    assert found["vs_plain"] == 2


def test_a_missing_engine_gives_null_and_the_reason() -> None:
    found, reasons = ratios({OURS: rate(100), FLOAT32: rate(20)}, {F16: "not installed"})
    assert found["vs_llamacpp_f16"] is None
    assert reasons["vs_llamacpp_f16"] == f"{F16}: not installed"
    assert "vs_transformers" not in reasons


def test_every_ratio_is_there_whatever_was_measured() -> None:
    found, reasons = ratios({}, dict.fromkeys(PLAYERS, "left out"))
    assert list(found) == list(RATIOS)
    assert set(reasons) == set(RATIOS)
    found, reasons = ratios({OURS: rate(None)}, {})
    assert "no token" in reasons["vs_plain"]


def test_the_table_is_markdown_with_a_line_for_each_engine() -> None:
    lines = table({OURS: Figures(123.456, 1.8, 14.58, 35.4), F16: rate(None)})
    assert lines[2] == f"| {OURS} | 123.5 | 1.80 | 14.6 | 35 |"
    assert lines[3] == f"| {F16} | n/a | 1.00 | 1.0 | 1 |"
    assert len({line.count("|") for line in lines}) == 1
