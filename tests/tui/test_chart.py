"""Charts in braille: what is drawn where."""

from __future__ import annotations

import math

import pytest

from tui.chart import Series, draw, finite, ticks

PLAIN = "{:g}".format


def lines(*series: Series, width: int = 24, height: int = 6, from_zero: bool = False) -> list[str]:
    drawn = draw(series, width, height, PLAIN, from_zero=from_zero)
    return ["".join(text for text, _ in runs) for runs in drawn]


def test_a_rising_line_goes_from_the_lower_left_to_the_upper_right() -> None:
    drawn = lines(Series("", "", [(0, 0), (10, 10)]))
    assert len(drawn) == 6
    plot = [line.partition("┤")[2] or line.partition("│")[2] for line in drawn[:-1]]
    columns = [line.index(next(c for c in line if c != " ")) for line in plot]
    assert columns == sorted(columns, reverse=True)
    assert columns[-1] == 0
    assert plot[0].rstrip()[-1] != " " and len(plot[0]) == len(plot[-1].ljust(len(plot[0])))


def test_the_axes_tell_the_range() -> None:
    drawn = lines(Series("", "", [(5, 2.0), (40, 8.0)]))
    assert drawn[-1].split() == ["5", "40"]
    labels = [line.split("┤")[0].strip() for line in drawn if "┤" in line]
    assert [float(label) for label in labels] == sorted(map(float, labels), reverse=True)
    assert all(2 <= float(label) <= 8 for label in labels)


def test_an_axis_may_begin_at_zero() -> None:
    drawn = lines(Series("", "", [(0, 90.0), (1, 100.0)]), from_zero=True)
    assert any(line.startswith(" ") and line.strip().startswith("0┤") for line in drawn)


def test_no_line_is_wider_than_asked_for() -> None:
    for width in range(8, 60, 7):
        drawn = lines(Series("", "", [(1, 12345.678), (9, 3.0)]), width=width)
        assert all(len(line) <= width for line in drawn)


@pytest.mark.parametrize("points", [[], [(0, math.nan)], [(1, math.inf)]])
def test_without_a_finite_point_there_is_no_chart(points: list[tuple[float, float]]) -> None:
    assert lines(Series("", "", points)) == []


def test_one_point_and_a_flat_line_can_be_seen() -> None:
    for points in ([(3.0, 7.0)], [(1.0, 0.0), (2.0, 0.0)]):
        drawn = lines(Series("", "", points))
        assert any("⠀" < character <= "⣿" for line in drawn for character in line)


def test_each_line_keeps_its_style() -> None:
    drawn = draw(
        [Series("a", "red", [(0, 0), (9, 0)]), Series("b", "blue", [(0, 9), (9, 9)])], 30, 6, PLAIN
    )
    assert "blue" in {style for _, style in drawn[0]}
    assert "red" in {style for _, style in drawn[-2]}


def test_many_points_are_thinned_out_but_the_last_stays() -> None:
    thin = finite([(n, n) for n in range(1000)], 50)
    assert len(thin) <= 51
    assert (thin[0], thin[-1]) == ((0, 0), (999, 999))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0008, 0.0011), (-3, 12345), (2.0, 2.1)])
def test_ticks_are_within_the_range_and_not_too_many(low: float, high: float) -> None:
    for most in range(2, 6):
        found = ticks(low, high, most)
        assert 1 <= len(found) <= most
        assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)
