"""Drawings in characters: right heights, right cells, gaps where nothing is known."""

from __future__ import annotations

import pytest

from tui.sparks import area, bars, nice_top, parts, spark


def test_a_sparkline_has_eight_heights_and_gaps() -> None:
    assert spark([0.0, 0.5, None, 1.0], 4) == "▁▄ █"


def test_the_newest_value_is_on_the_right_and_the_oldest_are_left_out() -> None:
    assert spark([1.0, 0.25, 0.5], 2) == "▂▄"
    assert spark([1.0], 3) == "  █"
    assert spark([1.0], 0) == ""


def test_an_area_fills_two_values_a_column_from_the_bottom() -> None:
    top, bottom = area([8.0, 4.0], 1, 2, 8.0)
    assert (ord(top) - 0x2800, ord(bottom) - 0x2800) == (0x47, 0xFF)


def test_a_zero_is_a_line_and_the_unknown_is_blank() -> None:
    assert area([None, None, 0.0, 0.0], 2, 1, 1.0) == ["\u2800\u28c0"]


def test_values_above_the_top_do_not_leave_the_drawing() -> None:
    assert area([99.0, 99.0], 1, 2, 1.0) == ["\u28ff", "\u28ff"]
    assert bars([99.0], 1, 2, 1.0) == ["█", "█"]


def test_bars_stand_apart() -> None:
    assert bars([1.0, 0.5, 0.25], 5, 2, 1.0) == ["█    ", "█ █ ▄"]
    assert bars([1.0, 0.5, 0.25], 3, 1, 1.0) == ["▄ ▂"]


def test_the_scale_is_a_round_number_above_all() -> None:
    assert nice_top([3.0, None, 17.2]) == 20
    assert nice_top([0.0]) == 1
    assert nice_top([]) == 1


@pytest.mark.parametrize("width", [0, 1, 7, 60])
@pytest.mark.parametrize("shares", [[0.62, 0.3, 0.02, 0.06], [1.0, 0, 0, 0], [0.25] * 4])
def test_parts_fill_the_width_exactly(shares: list[float], width: int) -> None:
    cells = parts(shares, width)
    assert sum(cells) == width
    assert all(abs(n - share * width) < 1 for n, share in zip(cells, shares, strict=True))
