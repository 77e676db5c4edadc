"""What an outline answer and the stages' timeline look like; see test_snapshots.py."""

from __future__ import annotations

from typing import Any

import pytest

from engine.protocol import FlightSpan, StageSpans
from tests.tui.chat import Chat
from tests.tui.test_snapshots import SIZES, looks_the_same, name

__all__ = ["looks_the_same"]

TITLES = ("Avoiding Heavy Meals", "Keeping a Sleep Diary", "Regular Schedule", "Less Coffee")
TEXTS = (
    " These are known to interfere with sleep.",
    " This is a great way to track your sleep, and to find out what keeps you awake.",
    " Go to bed at the same",
    "",
)


@pytest.mark.parametrize("size", SIZES, ids=name)
def test_points_that_grow(looks_the_same: Any, size: tuple[int, int]) -> None:
    async def grow(chat: Chat) -> None:
        await chat.pilot.press("f10")
        await chat.ask("How can I sleep better at night?")
        chat.client.started()
        chat.client.tokens("Here are some tips:\n\n")
        for point, title in enumerate(TITLES, 1):
            gap = "" if point == 1 else "\n\n"
            chat.client.tokens(f"{gap}{point}. **{title}**:", 8, point=point)
        for point, text in enumerate(TEXTS, 1):
            chat.client.tokens(text, len(text.split()), point=point)
        chat.client.tokens("", 0, point=1, ended=True)
        await chat.until(lambda: len(chat.shown().split("tokens")) >= 4)
        chat.screen._show_figures(type(chat.screen.running.meter.figures)())

    assert looks_the_same(size, grow)


@pytest.mark.parametrize("size", SIZES, ids=name)
def test_timeline(looks_the_same: Any, size: tuple[int, int]) -> None:
    async def tell(chat: Chat) -> None:
        for rank, (offset, seconds) in enumerate(((0.0, 0.012), (0.014, 0.027))):
            spans = []
            for number in range(24):
                began = 1000.0 + 0.03 * number + offset
                points = ((1, 2, 3), (4, 5))[number % 2] if number > 9 else (0,)
                decode = number > 7
                spans.append(FlightSpan(number, began, began + seconds, 8, decode, points))
            chat.client.event(StageSpans(tuple(spans)), rank)
        await chat.pilot.press("f4", "t")
        await chat.shows("points at once")

    assert looks_the_same(size, tell)
