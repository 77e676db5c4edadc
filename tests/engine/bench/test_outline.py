"""What the outline bench makes of its answers."""

from __future__ import annotations

import pytest

from engine.bench.outline import Answer, Side, ratio_of_lists, timeline_figures, told_timeline
from engine.protocol import FlightSpan
from engine.timeline import Timeline


def test_a_shorter_answer_wins_nothing() -> None:
    long = Side([Answer(100, 2.0, 0.1, 0), Answer(300, 6.0, 0.3, 0)])
    short = Side([Answer(10, 0.2, 0.1, 3)])
    assert long.ms_per_token == pytest.approx(short.ms_per_token)
    assert long.ttft_ms == pytest.approx(200)


def test_what_became_no_list_is_left_out_of_the_ratio_of_lists() -> None:
    plain = Side([Answer(100, 2.0, 0.1, 0), Answer(100, 1.0, 0.1, 0)])
    outline = Side([Answer(50, 0.5, 0.1, 4), Answer(100, 1.0, 0.1, 0)])
    assert ratio_of_lists(plain, outline) == pytest.approx(2.0)
    assert ratio_of_lists(plain, Side([Answer(100, 1.0, 0.1, 0)] * 2)) is None


def test_windows_count_by_their_length() -> None:
    timeline = Timeline()
    for rank in (0, 1):
        began = (0.0, 0.5, 10.0)
        spans = [FlightSpan(n, t + rank, t + rank + 0.5, 1, True, (n + 1,)) for n, t in
                 enumerate(began)]  # fmt: skip
        timeline.add(rank, spans)
    figures = timeline_figures([timeline.window(0.0, 2.0), timeline.window(10.0, 16.0)])
    assert figures["busy"] == [pytest.approx(1.5 / 8, abs=1e-3)] * 2
    assert figures["in_the_air"] == pytest.approx(4.5 / 8, abs=1e-3)
    assert figures["points_at_once"] == [2, 1]
    assert "stage 1 19%" in told_timeline(figures)
    assert told_timeline(timeline_figures([])) == "n/a"
