"""What steps cost: between what was measured, at another pace, and where clocks are odd."""

from __future__ import annotations

import math

import pytest

from engine.decoding.step_cost import StepCost

CPU_MS = {1: 12.5, 2: 13.5, 4: 15.5, 8: 18.5, 16: 24.0, 32: 32.0, 64: 48.0}
CPU = {rows: ms / 1000 for rows, ms in CPU_MS.items()}


def cost(measured: dict[int, float], draft: float = 0.002) -> StepCost:
    found = StepCost()
    whole = {rows: s + draft for rows, s in measured.items()}
    found.calibrate(whole, undrafted=measured[1])
    return found


def test_costs_lie_between_those_measured_and_go_on_behind_them() -> None:
    found = cost({1: 0.010, 16: 0.025, 64: 0.049})
    assert found.seconds(16, drafting=0.0) == pytest.approx(0.025)
    assert found.seconds(16, drafting=1.0) == pytest.approx(0.027)
    assert found.seconds(6, drafting=0.0) == pytest.approx(0.015)
    assert found.seconds(40, drafting=0.0) == pytest.approx(0.037)
    assert found.seconds(128, drafting=0.0) == pytest.approx(0.081)
    assert found.seconds(2048, drafting=0.0) > found.seconds(1024, drafting=0.0)


def test_a_slower_machine_changes_the_pace_and_not_how_sizes_compare() -> None:
    found = cost(CPU)
    ratio = found.seconds(16, drafting=1.0) / found.seconds(1, drafting=0.0)
    for _ in range(60):
        found.learn(8, 0.060, drafting=1.0)
    assert found.seconds(8, drafting=1.0) == pytest.approx(0.060, rel=0.02)
    after = found.seconds(16, drafting=1.0) / found.seconds(1, drafting=0.0)
    assert after == pytest.approx(ratio)


def test_a_step_of_another_size_corrects_its_cost_alone() -> None:
    found = cost(CPU)
    for _ in range(30):
        found.compare(16, 0.040, drafting=1.0)
    assert found.seconds(16, drafting=1.0) == pytest.approx(0.040, rel=0.02)
    assert found.seconds(8, drafting=1.0) == pytest.approx(0.0205)
    before = found.seconds(16, drafting=1.0)
    found.compare(16, 5.0, drafting=1.0)  # a step that was held up
    assert found.seconds(16, drafting=1.0) < 1.3 * before


def test_a_size_that_was_held_up_costs_no_more_than_the_next_larger() -> None:
    found = StepCost()
    found.calibrate({1: 0.060, 4: 0.012, 8: 0.190, 16: 0.024, 64: 0.072}, undrafted=0.010)
    expected = {1: 0.012, 4: 0.012, 8: 0.024, 16: 0.024, 64: 0.072}
    for rows, seconds in expected.items():
        assert found.seconds(rows, drafting=1.0) == pytest.approx(seconds)
    assert found.seconds(1, drafting=0.0) == pytest.approx(0.010)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -1.0, 0.0])
def test_what_is_no_duration_is_passed_over(odd: float) -> None:
    found = StepCost()
    found.calibrate({1: 0.012, 4: odd, 16: 0.024}, undrafted=odd)
    assert found.seconds(4, drafting=1.0) == pytest.approx(0.0144)
    found.learn(4, odd, drafting=1.0)
    found.compare(16, odd, drafting=1.0)
    assert found.seconds(16, drafting=1.0) == pytest.approx(0.024)


def test_a_clock_that_hardly_moves_makes_nothing_free() -> None:
    found = cost(CPU)
    before = found.seconds(16, drafting=1.0)
    found.compare(16, 1e-12, drafting=1.0)
    assert 0.5 * before < found.seconds(16, drafting=1.0) < before


@pytest.mark.parametrize("measured", [{}, {1: math.nan}, {1: 0.010}, {16: 0.020, 1: math.inf}])
def test_where_sizes_could_not_be_compared_they_are_guessed(measured: dict[int, float]) -> None:
    found = StepCost()
    found.calibrate(measured, undrafted=0.009)
    assert found.measured == any(math.isfinite(seconds) for seconds in measured.values())
    ratio = found.seconds(16, drafting=1.0) / found.seconds(1, drafting=1.0)
    guess = StepCost()
    guessed_ratio = guess.seconds(16, drafting=1.0) / guess.seconds(1, drafting=1.0)
    assert ratio == pytest.approx(guessed_ratio)
    for rows, seconds in measured.items():
        if math.isfinite(seconds):
            assert found.seconds(rows, drafting=1.0) == pytest.approx(seconds)


def test_costs_are_learned_without_having_been_measured_first() -> None:
    true = cost(CPU)
    found = StepCost()
    for turn in range(400):
        found.learn(4, true.seconds(4, drafting=1.0), drafting=1.0)
        rows = (1, 8, 16)[turn % 3]
        found.compare(rows, true.seconds(rows, drafting=1.0), drafting=1.0)
    for rows in (1, 8, 16):
        expected = true.seconds(rows, drafting=1.0)
        assert found.seconds(rows, drafting=1.0) == pytest.approx(expected, rel=0.05)
