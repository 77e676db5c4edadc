"""Blocks of a Markdown document that grow at their end instead of being made anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from markdown_it.token import Token
from rich.cells import cell_len
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.geometry import Size
from textual.widget import Widget
from textual.widgets import Label, Markdown
from textual.widgets._markdown import (
    MarkdownBlock,
    MarkdownBullet,
    MarkdownFence,
    MarkdownHeader,
    MarkdownListItem,
    MarkdownParagraph,
    MarkdownTable,
)

from tui.code_parts import Look, parts_of

NUMBER_CELLS = len(" 10. ")
"""Numbers of fewer digits are set to the right, so that those of a cut list stay in line."""


async def grow_last(
    parent: Widget, last: MarkdownBlock | None, blocks: Sequence[MarkdownBlock]
) -> MarkdownBlock:
    """Have `blocks` (at least one) in the place of `last`, the last block that `parent` shows.

    The first of them is what became of `last`, which changes in place where it can. Returns the
    block that is the last one then.
    """
    first, *rest = blocks
    if last is None:
        await parent.mount_all(blocks)
        return blocks[-1]
    if await _become(last, first):
        first = last
    else:
        await parent.mount(first, after=last)
        await last.remove()
    if rest:
        await parent.mount_all(rest)
    return rest[-1] if rest else first


async def _become(last: MarkdownBlock, block: MarkdownBlock) -> bool:
    """Change `last` into `block`, which was parsed from a longer source; False if it cannot be."""
    if type(last) is not type(block):
        return False
    match last:
        case MarkdownParagraph() | MarkdownHeader():
            last.set_content(block._content)
            last._copy_context(block)
        case AnswerFence() | AnswerList():
            await last._update_from_block(block)
        case MarkdownTable() if last._rows:
            await last._update_from_block(block)
        case _:
            return False
    last.source_range = block.source_range
    last.set_class(block.has_class("-goes-on"), "-goes-on")
    return True


class AnswerFence(MarkdownFence):
    """A code block in parts, of which only the last one still changes."""

    DEFAULT_CSS = """
    AnswerFence {
        padding: 1 0;
        background: $surface;
        & > Label { padding: 0 2; }
        &:light { background: $surface; }
        &:ansi > Label { padding: 0; }
    }
    """

    def __init__(self, markdown: Markdown, token: Token, code: str) -> None:
        MarkdownBlock.__init__(self, markdown, token)  # not MarkdownFence's: it colours everything
        self.code = code
        self.lexer = token.info
        self.auto_links = False
        self._look = self._wanted_look()
        self._finished = 0
        """Lines in the parts that do not change any more."""

    def compose(self) -> ComposeResult:
        """A label for each part."""
        yield from self._labels()

    async def _update_from_block(self, block: MarkdownBlock) -> None:
        assert isinstance(block, AnswerFence)
        finished = self.code.split("\n")[: self._finished]
        goes_on = block.code.split("\n")[: self._finished] == finished
        same_language = block.lexer == self.lexer
        self._token, self.code, self.lexer = block._token, block.code, block.lexer
        if not (goes_on and same_language):
            await self._rebuild()
            return
        first, *rest = self._labels()
        self.query_children(Label).last().update(first.content)
        if rest:
            await self.mount_all(rest)

    def notify_style_update(self) -> None:
        """Colour anew when the kind of theme has changed; the colours themselves are variables."""
        super(MarkdownFence, self).notify_style_update()
        if self._look != self._wanted_look():
            self._look = self._wanted_look()
            self.call_later(self._rebuild)

    async def _rebuild(self) -> None:
        self._finished = 0
        with self.app.batch_update():
            await self.query_children(Label).remove()
            await self.mount_all(self._labels())

    def _labels(self) -> list[Label]:
        """Labels for the lines behind the finished parts; the last of them may still change."""
        parts = parts_of(self.code.split("\n")[self._finished :], self.lexer, self._look)
        self._finished += sum(part.lines for part in parts[:-1])
        return [Label(part.content) for part in parts]

    def _wanted_look(self) -> Look:
        return Look(self.app.native_ansi_color, self.app.current_theme.dark)


class AnswerList(MarkdownBlock):
    """A list to which items are added, and whose last item grows.

    Items of words alone are one widget together, however many there are; any other item, such as
    one with a code block in it, has a row of widgets.
    """

    DEFAULT_CSS = """
    AnswerList {
        margin: 0 0 1 0;
        Horizontal, Vertical { width: 1fr; height: auto; }
        AnswerList { margin: 0; }
    }
    """

    def __init__(self, markdown: Markdown, token: Token) -> None:
        super().__init__(markdown, token)
        self._shown: list[Group] = []

    def compose(self) -> ComposeResult:
        """A widget for each group of items."""
        self._shown = self.groups()
        for group in self._shown:
            yield self._widget(group)

    def groups(self) -> list[Group]:
        """The items as they come from the parser, those of words alone together."""
        items = [block for block in self._blocks if isinstance(block, MarkdownListItem)]
        groups: list[Group] = []
        for item, symbol in zip(items, self.symbols(items), strict=True):
            plain = all(isinstance(block, PLAIN) for block in every_block(item))
            if not (plain and groups and groups[-1].plain):
                groups.append(Group(plain, []))
            groups[-1].items.append((symbol, item))
        return groups

    def symbols(self, items: Sequence[MarkdownListItem]) -> Iterable[str]:
        """What stands before each item."""
        raise NotImplementedError

    async def _update_from_block(self, block: MarkdownBlock) -> None:
        assert isinstance(block, AnswerList)
        groups, last = block.groups(), len(self._shown) - 1
        children = list(self.children)
        if not 0 <= last < len(groups) or groups[last].plain != self._shown[last].plain:
            await self.query_children().remove()
            last = -1
        elif groups[last].plain:
            words = children[last]
            assert isinstance(words, ListWords)
            words.show(groups[last].lines())
        else:
            body = children[last].query_children(Vertical).first()
            shown = [*body.query_children(MarkdownBlock)]
            blocks = groups[last].items[0][1]._blocks
            if shown and len(blocks) >= len(shown):
                await grow_last(body, shown[-1], blocks[len(shown) - 1 :])
            else:
                await body.query_children().remove()
                await body.mount_all(blocks)
        self._shown = groups
        await self.mount_all([self._widget(group) for group in groups[last + 1 :]])

    def _widget(self, group: Group) -> Widget:
        if group.plain:
            words = ListWords(self._markdown, self._token)
            words.show(group.lines())
            return words
        ((symbol, item),) = group.items
        bullet = MarkdownBullet()
        bullet.symbol = symbol
        return Horizontal(bullet, Vertical(*item._blocks))


class AnswerBulletList(AnswerList):
    """A list with bullets."""

    def symbols(self, items: Sequence[MarkdownListItem]) -> Iterable[str]:
        """Bullets by the depth of the list."""
        return [item.bullet for item in items]


class AnswerOrderedList(AnswerList):
    """A list with numbers."""

    def symbols(self, items: Sequence[MarkdownListItem]) -> Iterable[str]:
        """The first item's number, then on from there, as Markdown wants it."""
        start = int(items[0].bullet) if items and items[0].bullet.isdecimal() else 1
        return [f"{start + index}. ".rjust(NUMBER_CELLS) for index in range(len(items))]


PLAIN = (MarkdownParagraph, AnswerList, MarkdownListItem)


def every_block(block: MarkdownBlock) -> Iterator[MarkdownBlock]:
    """The blocks within `block`, at any depth, before they are mounted."""
    for child in block._blocks:
        yield child
        yield from every_block(child)


@dataclass
class Group:
    """Items of a list that are shown by one widget: any number of plain ones, or another."""

    plain: bool
    items: list[tuple[str, MarkdownListItem]]

    def lines(self) -> list[tuple[str, Content]]:
        """The paragraphs of plain items, each with what stands before its first line."""
        return [line for symbol, item in self.items for line in lines_of(item, symbol)]


def lines_of(item: MarkdownListItem, symbol: str) -> Iterator[tuple[str, Content]]:
    """The paragraphs of a plain item and of the lists in it."""
    indent = " " * cell_len(symbol)
    before = symbol
    for block in item._blocks:
        if isinstance(block, AnswerList):
            for group in block.groups():
                for inner, content in group.lines():
                    yield before + inner, content
                    before = indent
        else:
            yield before, block._content
            before = indent


class ListWords(MarkdownBlock):
    """The text of plain list items, set behind their bullets."""

    DEFAULT_CSS = """
    ListWords { margin: 0; }
    """

    def __init__(self, markdown: Markdown, token: Token) -> None:
        super().__init__(markdown, token)
        self._lines: list[tuple[str, Content]] = []
        self._wrapped: dict[int, list[Content]] = {}

    def show(self, lines: list[tuple[str, Content]]) -> None:
        """Show these paragraphs, each with what stands before its first line."""
        self._lines = lines
        self._wrapped.clear()
        self.refresh(layout=True)

    def render(self) -> Content:
        """The lines as they fit."""
        return Content("\n").join(self._wrap(self.content_size.width))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """As many lines as there are at this width."""
        return len(self._wrap(width))

    def _wrap(self, width: int) -> list[Content]:
        if width not in self._wrapped:
            self._wrapped = {width: [*self._set(width)]}
        return self._wrapped[width]

    def _set(self, width: int) -> Iterator[Content]:
        for before, content in self._lines:
            start = Content.styled(before, "$text-primary")
            room = max(8, width - start.cell_length)
            for line in content.wrap(room):
                yield Content.assemble(start, line)
                start = Content(" " * start.cell_length)
