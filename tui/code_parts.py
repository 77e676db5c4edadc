"""Code in colours, cut into parts that can be coloured each for itself while more code comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, String, _TokenType
from pygments.util import ClassNotFound
from textual.content import Content, Span
from textual.highlight import ANSIDarkHighlightTheme, ANSILightHighlightTheme, HighlightTheme

PART_LINES = 24
"""A part has at least so many lines, but for the last one."""
LONGEST_PART = 200
"""Lines after which a part is cut also within a long string or comment."""
TAB = 4


@dataclass(frozen=True)
class Part:
    """Some whole lines of code in colours."""

    content: Content
    lines: int


@dataclass(frozen=True)
class Look:
    """Which colours code gets: those of an ANSI theme or not, dark or light."""

    ansi: bool
    dark: bool

    @property
    def styles(self) -> Mapping[_TokenType, str]:
        """Style names by pygments token type."""
        if not self.ansi:
            return HighlightTheme.STYLES
        return (ANSIDarkHighlightTheme if self.dark else ANSILightHighlightTheme).STYLES


def parts_of(lines: Sequence[str], language: str, look: Look) -> list[Part]:
    """Cut `lines` into parts, at least one; lines that follow later change only the last.

    An end of line within a string or a comment is no place to cut: what follows would get the
    wrong colours. A language that is not known, or not named, is shown without colours.
    """
    code = "\n".join(lines).expandtabs(TAB)
    spans: list[Span] = []
    parts: list[Part] = []
    start = line = first_line = 0
    for begin, kind, text in _tokens(code, language):
        if style := _style(kind, look.styles):
            spans.append(Span(begin - start, begin - start + len(text), style))
        line += text.count("\n")
        cut = line - first_line
        if text.endswith("\n") and cut >= PART_LINES and (_ends_clean(kind) or cut >= LONGEST_PART):
            end = begin + len(text)
            parts.append(Part(_content(code[start : end - 1], spans), cut))
            spans, start, first_line = [], end, line
    return [*parts, Part(_content(code[start:], spans), len(lines) - first_line)]


def _content(text: str, spans: list[Span]) -> Content:
    return Content(text, spans=spans).stylize_before("$text")


def _tokens(code: str, language: str) -> Iterator[tuple[int, _TokenType, str]]:
    """pygments' tokens with where they begin; one that holds several lines is given line by line.

    A multi-line string or comment can so still be cut where it is far too long.
    """
    for begin, kind, text in _lexer(language).get_tokens_unprocessed(code):
        for piece in text.splitlines(keepends=True):
            yield begin, kind, piece
            begin += len(piece)


@lru_cache(32)
def _lexer(language: str) -> Lexer:
    try:
        return get_lexer_by_name(language or "text")
    except ClassNotFound:
        return get_lexer_by_name("text")


def _ends_clean(kind: _TokenType) -> bool:
    """Whether nothing is open behind a token of `kind` that ends with the line."""
    return kind not in String and (kind not in Comment or kind is Comment.Single)


def _style(kind: _TokenType, styles: Mapping[_TokenType, str]) -> str | None:
    """The style of `kind` or of the nearest kind it belongs to."""
    at: _TokenType | None = kind
    while at is not None:
        if at in styles:
            return styles[at]
        at = at.parent
    return None
