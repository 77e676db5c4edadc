"""Outline decoding: the outline of an answer that is a list, read as it is written. Pure text.

The prompt technique is Skeleton-of-Thought's (Ning et al. 2023): a short outline first, then each
of its points on its own. Here the model begins its answer as ever. Where that becomes a list, the
outline is written in its place, a line `1. **a few words**` for each point, and every point goes
on behind `1. **a few words**:` as a sequence of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

MIN_POINTS, MAX_POINTS = 3, 10
TITLE_WORDS = 8
"""A point of more words is cut off there."""
POINT_END = "\n\n"
"""Between two points of the answer; a point that writes it is done."""

_LIST = re.compile(r"(?:^|\n)(?P<at> {0,3})(?P<mark>1[.)]|[-*•]) ")
_MAYBE_LIST = re.compile(r"(?:^|\n)(?P<at> {0,3}(?:1[.)]?|[-*•])?)$")
_TITLE_END = re.compile(r"\*\*|[:\n]| [-–—] ")
_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COUNTS = {word: count for count, word in enumerate(_WORDS, 2)}
# Words that a title does not end with where it was cut.
_NO_END = frozenset(("a", "an", "and", "by", "for", "from", "in", "of", "or", "the", "to", "with"))
_ASKED = re.compile(
    r"\b(?:list|give|name|tell|write|suggest|share|provide|describe|explain|show|top|are|need|want)"
    rf"\b[^.?!\n]{{0,24}}?\b(?P<count>{'|'.join(_COUNTS)}|[2-9]|10)\b(?![-\s]+(?:years?|year-old))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Style:
    """How the points of a list are marked."""

    numbered: bool

    def marker(self, point: int) -> str:
        """What a point begins with; points count from 1."""
        return f"{point}. **" if self.numbered else "- **"

    def stops(self, point: int) -> tuple[str, ...]:
        """Texts that show that the model has gone on to something else than the point."""
        return (POINT_END, f"\n{point + 1}." if self.numbered else "\n- **", "\n**")


@dataclass(frozen=True)
class ListStart:
    """Where in an answer its list begins."""

    at: int
    style: Style


def find_list(text: str) -> ListStart | None:
    """The beginning of a list in what the model has written so far, None where there is none."""
    found = _LIST.search(text)
    if found is None or text[: found.start("at")].count("```") % 2:
        return None
    return ListStart(found.start("at"), Style(found["mark"].startswith("1")))


def settled(text: str) -> int:
    """How many characters of `text` cannot be part of a list's first marker."""
    found = _MAYBE_LIST.search(text)
    return len(text) if found is None else found.start("at")


def asked_for(question: str) -> int | None:
    """How many points a question asks for in so many words, such as "give me five tips"."""
    found = _ASKED.search(question)
    if found is None:
        return None
    count = found["count"].lower()
    return _COUNTS.get(count) or int(count)


class Next(Enum):
    """What is to be done after more of the outline was read."""

    WAIT = "wait"
    """Let the model write on."""
    AGAIN = "again"
    """Have `Outline.prompt` continued instead of what was written."""
    DONE = "done"


@dataclass
class Outline:
    """An outline in the making.

    The model goes on behind `prompt`. A line that goes on after its few words is cut there; where
    the list ends too early, the next marker is put there; a point that was there already is
    written once more with `sample` set, and the second time it ends the outline.
    """

    style: Style
    most: int = MAX_POINTS
    least: int = MIN_POINTS
    titles: list[str] = field(default_factory=list)
    prompt: str = ""
    sample: bool = False
    """Draw the next title at random: the likeliest was there already."""

    def __post_init__(self) -> None:
        self.prompt = self._lines() + self.style.marker(len(self.titles) + 1)

    def header(self, point: int) -> str:
        """The point's beginning in the answer; the model goes on behind it."""
        return f"{self.style.marker(point)}{self.titles[point - 1]}**:"

    def read(self, written: str, *, ended: bool = False) -> Next:
        """Take in all that was written behind `prompt`.

        `ended` says that the model has stopped there.
        """
        titles, rest = parse_lines(self.prompt + written + "\n" * ended, self.style)
        for title in titles[len(self.titles) :]:
            if not title or title.casefold() in map(str.casefold, self.titles):
                return self._another()
            self.titles.append(title)
            self.sample = False
            if len(self.titles) >= self.most:
                return Next.DONE
        if rest is Rest.OPEN and not ended:
            return Next.WAIT
        if rest is Rest.CUT and not ended:
            self.prompt = self._lines()
            return Next.AGAIN
        if len(self.titles) >= self.least:
            return Next.DONE
        self.prompt = self._lines() + self.style.marker(len(self.titles) + 1)
        return Next.AGAIN

    def _another(self) -> Next:
        if self.sample:
            return Next.DONE
        self.sample = True
        self.prompt = self._lines() + self.style.marker(len(self.titles) + 1)
        return Next.AGAIN

    def _lines(self) -> str:
        marked = enumerate(self.titles, 1)
        return "".join(f"{self.style.marker(n)}{title}**\n" for n, title in marked)


def _title(words: list[str]) -> str:
    if len(words) > TITLE_WORDS:
        words = words[:TITLE_WORDS]
        while words and words[-1].lower() in _NO_END:
            words.pop()
    return " ".join(words).strip("*_ ")


class Rest(Enum):
    """What comes behind the last whole title of an outline."""

    OPEN = "open"
    """Nothing, or the beginning of the next line."""
    CUT = "cut"
    """The line goes on after its title."""
    OVER = "over"
    """The next line is no point."""


def parse_lines(text: str, style: Style) -> tuple[list[str], Rest]:
    """The titles that are whole, and what comes behind them."""
    titles: list[str] = []
    at = 0
    while True:
        marker = style.marker(len(titles) + 1)
        begun = text[at : at + len(marker)]
        if begun != marker:
            return titles, Rest.OPEN if marker.startswith(begun) else Rest.OVER
        at += len(marker)
        end = _TITLE_END.search(text, at)
        words = (text[at:] if end is None else text[at : end.start()]).split()
        if end is None and len(words) <= TITLE_WORDS:
            return titles, Rest.OPEN
        titles.append(_title(words))
        if end is None or len(words) > TITLE_WORDS:
            return titles, Rest.CUT
        closing = text[end.start() : end.start() + 3]
        if closing != "**\n":
            return titles, Rest.OPEN if "**\n".startswith(closing) else Rest.CUT
        at = end.start() + 3


def share_tokens(left: int, points: int, most: int) -> int:
    """Tokens that each point may have of the `left` ones of the answer, at most `most`."""
    return max(1, min(most, left // points))


class Parts:
    """An answer whose points grow side by side, in the order in which it is read.

    Point 0 is what comes before the list, and all of an answer that is none.
    """

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}

    def add(self, point: int, text: str) -> None:
        """Let a point grow."""
        self.texts[point] = self.texts.get(point, "") + text

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(text for _, text in sorted(self.texts.items()))
