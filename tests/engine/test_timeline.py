"""When each stage computed what, as the stages tell it."""

from __future__ import annotations

import pytest

from engine.protocol import FlightSpan
from engine.timeline import KEPT, Timeline


def span(number: int, began: float, ended: float, *points: int) -> FlightSpan:
    return FlightSpan(number, began, ended, 1, True, points or (0,))


def two_stages() -> Timeline:
    timeline = Timeline()
    timeline.add(0, [span(0, 10.0, 10.2, 1), span(1, 10.2, 10.4, 2, 3), span(2, 10.8, 11.0)])
    timeline.add(1, [span(0, 10.2, 10.5, 1), span(1, 10.5, 10.8, 2, 3)])
    return timeline


def test_shares_flights_and_points_are_those_of_the_window() -> None:
    window = two_stages().window(10.0, 11.0)
    assert window.busy(0) == pytest.approx(0.6)
    assert window.busy(1) == pytest.approx(0.6)
    # Micro-batch 0 is under way for 0.5 s and 1 for 0.6 s; 2 has not come back.
    assert window.in_the_air() == pytest.approx(1.1)
    assert window.points_at_once() == 3
    assert window.all_busy() == pytest.approx(0.2)
    half = two_stages().window(10.1, 10.3)
    assert half.busy(0) == pytest.approx(1.0)
    assert half.busy(1) == pytest.approx(0.5)


def test_a_lock_step_never_has_two_points_at_once() -> None:
    timeline = Timeline()
    timeline.add(0, [span(n, n, n + 0.4, 1 + n % 2) for n in range(6)])
    timeline.add(1, [span(n, n + 0.5, n + 0.9, 1 + n % 2) for n in range(6)])
    window = timeline.latest(6.0)
    assert window.points_at_once() == 1
    assert window.all_busy() == 0
    assert window.in_the_air() < 1  # type: ignore[operator]


def test_the_latest_window_ends_where_all_stages_have_told() -> None:
    assert two_stages().latest(0.5).ended == pytest.approx(10.8)
    assert two_stages().latest(0.5, outline=True).ended == pytest.approx(10.4)
    assert Timeline().latest(1.0).seconds == 0
    assert Timeline().latest(1.0).in_the_air() is None
    assert Timeline().latest(1.0).all_busy() is None


def test_what_is_told_twice_counts_once_and_the_oldest_goes() -> None:
    timeline = Timeline()
    for _ in range(2):
        timeline.add(0, [span(n, n, n + 1.0) for n in range(KEPT + 5)])
    window = timeline.window(0.0, KEPT + 5.0)
    assert len(window.stages[0]) == KEPT
    assert window.busy(0) == pytest.approx(KEPT / (KEPT + 5))
