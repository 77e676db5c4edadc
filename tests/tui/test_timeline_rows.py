"""The timeline as cells."""

from __future__ import annotations

from engine.protocol import FlightSpan
from engine.timeline import Timeline
from tui.timeline_rows import cells


def span(number: int, began: float, ended: float, *points: int) -> FlightSpan:
    return FlightSpan(number, began, ended, 1, True, points or (0,))


def test_cells_show_points_in_turns_and_bubbles() -> None:
    timeline = Timeline()
    timeline.add(0, [span(0, 10.0, 10.2, 1), span(1, 10.2, 10.4, 2, 3), span(2, 10.8, 11.0)])
    timeline.add(1, [span(0, 10.2, 10.5, 1), span(1, 10.5, 10.8, 2, 3)])
    window = timeline.window(10.0, 11.0)
    assert "".join(cell.text for cell in cells(window, 0, 10)) == "1123····██"
    assert "".join(cell.text for cell in cells(window, 1, 10)) == "··111232··"
