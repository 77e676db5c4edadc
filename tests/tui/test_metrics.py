"""Figures for people: measured or n/a."""

from __future__ import annotations

import pytest

from engine.protocol import Finished, Metrics, Started
from tui import metrics
from tui.metrics import Figures, Meter


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (0.0384, "38 ms"),
        (0.0996, "0.10 s"),
        (0.214, "0.21 s"),
        (9.996, "10.0 s"),
        (12.34, "12.3 s"),
        (99.96, "1 min 40 s"),
        (125.2, "2 min 05 s"),
    ],
)
def test_a_duration_has_about_three_digits(value: float | None, text: str) -> None:
    assert metrics.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "n/a tok/s"), (9.421, "9.42 tok/s"), (24.53, "24.5 tok/s"), (131.6, "132 tok/s")],
)
def test_a_rate_has_about_three_digits(value: float | None, text: str) -> None:
    assert metrics.rate(value) == text


def test_what_was_not_measured_is_never_shown_as_zero() -> None:
    nothing = Figures()
    shown = [
        metrics.seconds(nothing.ttft_s),
        metrics.rate(nothing.tokens_per_s),
        metrics.per_step(nothing.tokens_per_step),
        metrics.prefill(nothing),
        metrics.count(nothing.completion_tokens),
    ]
    assert all("n/a" in text and "0" not in text for text in shown)


def test_counts_splits_and_layers_read_naturally() -> None:
    assert metrics.count(2048) == "2,048"
    assert metrics.split((10, 10, 10)) == "10|10|10"
    assert metrics.layer_range(15, 15) == "15–29"
    assert metrics.layer_range(7, 1) == "7"


def test_a_bar_is_full_only_when_all_is_done() -> None:
    assert metrics.bar(0, 0, 4) == ("", "────")
    assert metrics.bar(136, 137, 4) == ("━━━", "─")
    assert metrics.bar(137, 137, 4) == ("━━━━", "")


def test_the_live_rate_counts_the_tokens_after_the_first() -> None:
    meter = Meter(sent_at=100.0)
    meter.tokens(1, at=100.5)
    assert meter.figures.ttft_s == 0.5
    assert meter.figures.tokens_per_s is None
    meter.tokens(4, at=101.0)
    meter.tokens(4, at=101.5)
    assert meter.figures.tokens_per_s == 8.0
    assert meter.figures.completion_tokens == 9


def test_only_prompt_tokens_that_were_not_cached_count_as_prefilled() -> None:
    meter = Meter(sent_at=0.0)
    meter.started(Started(request_id="r", prompt_tokens=154, cached_tokens=120))
    assert meter.figures.prefilled_tokens == 34
    assert metrics.prefill(meter.figures) == "34 new, 120 cached"


def test_the_engines_own_figures_replace_those_seen_from_here() -> None:
    meter = Meter(sent_at=0.0)
    meter.tokens(1, at=1.0)
    meter.tokens(1, at=2.0)
    meter.finished(
        Finished(
            request_id="r",
            finish_reason="stop",
            context_full=False,
            prompt_tokens=10,
            cached_tokens=4,
            completion_tokens=2,
            metrics=Metrics(ttft_s=0.9, tokens_per_s=None, mean_accepted_len=1.5),
        )
    )
    assert meter.figures == Figures(
        ttft_s=0.9,
        tokens_per_s=1.0,
        tokens_per_step=1.5,
        prompt_tokens=10,
        cached_tokens=4,
        completion_tokens=2,
    )
