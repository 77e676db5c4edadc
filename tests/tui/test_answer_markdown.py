"""Markdown that grows: what is shown at the end does not depend on the pieces it came in."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from textual.app import App, ComposeResult
from textual.containers import VerticalScroll
from textual.pilot import Pilot

from tui.bench_text import document, tokens
from tui.widgets.answer_blocks import AnswerFence
from tui.widgets.answer_markdown import AnswerMarkdown

NUMBERED = "\n".join(f"{n}. Item {n} of a *list*" for n in range(1, 31))
NESTED = "- one\n  - inner\n\n    more\n- two\n\n  ```python\n  x = 1\n  y = 2\n  ```\n- three\n"
LINES = "\n".join(f"x_{n} = 'text {n}'" for n in range(80))
CODE = f"Look:\n\n```python\n{LINES}\n```\nDone.\n"
SETEXT = "A line\nthat becomes\n===\n\na heading\n\n> a\n> quotation\n\nplain *end"
TABLE = "| a | b |\n|---|---|\n" + "".join(f"| {n} | **{n}** |\n" for n in range(6)) + "\nafter\n"
TEXTS = [NUMBERED, NESTED, CODE, SETEXT, TABLE, document(code_lines=30)]


class Page(App[None]):
    def __init__(self) -> None:
        super().__init__()
        self.markdown = AnswerMarkdown()

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield self.markdown


@asynccontextmanager
async def page() -> AsyncIterator[tuple[AnswerMarkdown, Pilot[None]]]:
    app = Page()
    async with app.run_test(size=(80, 400)) as pilot:
        yield app.markdown, pilot


async def shown(pieces: Sequence[str]) -> str:
    """The screen after the pieces were appended."""
    async with page() as (markdown, pilot):
        for piece in pieces:
            await markdown.append(piece)
        await pilot.pause()
        screen = pilot.app.screen
        lines = screen._compositor.render_strips(screen.size)
        return "\n".join(line.text.rstrip() for line in lines).strip()


def cut(text: str, seed: int) -> list[str]:
    """`text` in pieces of 1 to 40 characters."""
    rng, pieces = random.Random(seed), []
    while text:
        size = rng.randint(1, 40)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@pytest.mark.parametrize("text", TEXTS, ids=["list", "nested", "code", "setext", "table", "mixed"])
async def test_a_text_in_pieces_looks_as_it_does_in_one(text: str) -> None:
    assert await shown(cut(text, seed=1)) == await shown([text])


async def test_a_long_list_is_shown_in_line_with_its_numbers() -> None:
    lines = (await shown(cut(NUMBERED, seed=2))).splitlines()
    assert [line.split()[0] for line in lines] == [f"{n}." for n in range(1, 31)]
    assert {line.index("Item") for line in lines[1:]} == {lines[9].index("Item")}


async def test_an_item_with_code_keeps_its_place_in_the_list() -> None:
    lines = [line.strip() for line in (await shown(cut(NESTED, seed=3))).splitlines()]
    words = [line for line in lines if line]
    assert words == ["• one", "▪ inner", "more", "• two", "x = 1", "y = 2", "• three"]


async def test_a_long_code_block_stays_few_widgets_and_whole() -> None:
    async with page() as (markdown, pilot):
        for piece in cut(CODE, seed=4):
            await markdown.append(piece)
        await pilot.pause()
        (fence,) = markdown.query(AnswerFence)
        assert fence.code == LINES
        assert len(fence.children) <= 80 // 24 + 1
        assert sum(child.size.height for child in fence.children) == 80


async def test_a_link_in_a_list_is_a_link() -> None:
    clicked: asyncio.Queue[str] = asyncio.Queue()

    class Linked(Page):
        def on_markdown_link_clicked(self, message: AnswerMarkdown.LinkClicked) -> None:
            clicked.put_nowait(message.href)

    app = Linked()
    async with app.run_test() as pilot:
        await app.markdown.append("- see [this](https://example.org)\n")
        await pilot.pause()
        await pilot.click("ListWords", offset=(7, 0))
        assert await asyncio.wait_for(clicked.get(), 5) == "https://example.org"


def test_the_bench_s_document_is_cut_into_tokens_without_loss() -> None:
    text = document(code_lines=400)
    assert "".join(tokens(text)) == text
    assert text.count("```") == 2 and text.split("```")[1].count("\n") == 401
