"""Markdown that keeps up with a fast model, however long the answer gets.

A piece that is added costs what the block at the end costs, never what the whole answer does:
only that block is parsed again, a long list is cut into finished lists, and a long code block
consists of finished parts of which only the last is coloured anew.
"""

from __future__ import annotations

import asyncio
from functools import lru_cache
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token
from textual.await_complete import AwaitComplete
from textual.widgets import Markdown
from textual.widgets.markdown import MarkdownBlock

from tui.widgets.answer_blocks import (
    AnswerBulletList,
    AnswerFence,
    AnswerList,
    AnswerOrderedList,
    grow_last,
)

LIST_ITEMS = 8
"""A list that grows beyond so many items is cut: those before the last become a list of its own."""
LISTS = ("bullet_list_open", "ordered_list_open")


@lru_cache(1)
def parser() -> MarkdownIt:
    """The one parser; to make it takes longer than to parse a paragraph."""
    return MarkdownIt("gfm-like")


class AnswerMarkdown(Markdown):
    """A Markdown document to stream into, which tells when it has taken something in."""

    DEFAULT_CSS = """
    AnswerMarkdown > .-goes-on, AnswerMarkdown > .-last { margin-bottom: 0; }
    """
    BLOCKS = {  # noqa: RUF012 (Textual declares it so)
        **Markdown.BLOCKS,
        "fence": AnswerFence,
        "code_block": AnswerFence,
        "bullet_list_open": AnswerBulletList,
        "ordered_list_open": AnswerOrderedList,
    }

    def __init__(self) -> None:
        super().__init__(open_links=False, parser_factory=parser)
        self._took = asyncio.Event()
        self._live: MarkdownBlock | None = None
        """The last block, which may still change, and the line of the source where it begins."""
        self._live_line = 0

    def append(self, markdown: str) -> AwaitComplete:
        """Add to the end; the source has grown when this returns, the screen when it is awaited."""
        self._markdown = self.source + markdown
        self._took.set()
        return AwaitComplete(self._show_rest())

    async def has_source(self, length: int) -> None:
        """Wait until `length` characters were appended."""
        while len(self.source) < length:
            self._took.clear()
            await self._took.wait()

    async def _show_rest(self) -> None:
        """Parse the source from the live block on, and show what has changed."""
        async with self.lock:
            lines = self.source.splitlines(keepends=True)
            tokens = cut_long_list(parser().parse("".join(lines[self._live_line :])))
            blocks = list(self._parse_markdown(tokens))
            if not blocks:
                return
            for block in blocks:
                start, end = block.source_range
                block.source_range = start + self._live_line, end + self._live_line
            for block, following in pairwise(blocks):
                cut = isinstance(block, AnswerList) and type(block) is type(following)
                block.set_class(cut, "-goes-on")
            with self.app.batch_update():
                await self._place(blocks)
            self._live_line = blocks[-1].source_range[0]

    async def _place(self, blocks: list[MarkdownBlock]) -> None:
        """Show `blocks` from the place of the live block on."""
        before = self._live
        self._live = await grow_last(self, before, blocks)
        # Not by `:last-child`, which has all blocks styled anew for each that is added.
        if before is not None and before is not self._live:
            before.remove_class("-last")
        self._live.add_class("-last")


def cut_long_list(tokens: list[Token]) -> list[Token]:
    """`tokens` of a document, with the last item of a long list at its end in a list of its own."""
    if not tokens or tokens[-1].level or not tokens[-1].type.endswith("list_close"):
        return tokens
    first = max(i for i, token in enumerate(tokens) if token.type in LISTS and not token.level)
    items = [
        i
        for i, token in enumerate(tokens[first:], first)
        if token.type == "list_item_open" and token.level == 1
    ]
    if len(items) <= LIST_ITEMS:
        return tokens
    whole, last = tokens[first], items[-1]
    assert whole.map is not None
    line = (tokens[last].map or whole.map)[0]
    before, behind = whole.copy(map=[whole.map[0], line]), whole.copy(map=[line, whole.map[1]])
    return [*tokens[:first], before, *tokens[first + 1 : last], tokens[-1], behind, *tokens[last:]]
