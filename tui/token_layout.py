"""Tokens on lines: an answer's tokens broken into lines of a width, and found there again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import get_character_cell_size

from tui.speculation import TracedToken
from tui.text import harmless

NOTHING = "◦"
"""A token that adds no text."""
LINE_END = "↵"
TAB = "    "


@dataclass(frozen=True)
class Run:
    """Some cells of one line that belong to one token."""

    token: int
    text: str
    cells: int


Line = list[Run]
_Cell = tuple[str, int]  # a character and its token


def visible(text: str) -> str:
    """A token's text on one line: outer spaces as dots, line ends and tabs as signs."""
    if not text:
        return NOTHING
    inner = harmless(text).replace("\n", LINE_END).replace("\t", "⇥")
    left = len(inner) - len(inner.lstrip(" "))
    right = len(inner) - max(left, len(inner.rstrip(" ")))
    return "·" * left + inner[left : len(inner) - right] + "·" * right


class TokenLayout:
    """The lines of a growing answer: only its last paragraph is ever broken anew."""

    def __init__(self, width: int) -> None:
        self.width = max(4, width)
        self.lines: list[Line] = []
        self._settled: dict[int, tuple[int, int]] = {}
        self._open: dict[int, tuple[int, int]] = {}
        self._taken = 0
        self._paragraph: list[_Cell] = []
        self._paragraph_line = 0

    def add(self, tokens: Sequence[TracedToken]) -> int:
        """Take in what `tokens` has more than at the last call; returns the first changed line."""
        changed = self._paragraph_line
        for token in range(self._taken, len(tokens)):
            text = harmless(tokens[token].text).replace("\t", TAB) or NOTHING
            for character in text:
                if character == "\n":
                    self._paragraph.append((LINE_END, token))
                    self._end_paragraph()
                else:
                    self._paragraph.append((character, token))
        self._taken = len(tokens)
        self._break_paragraph()
        return changed

    def place(self, token: int) -> tuple[int, int]:
        """Line and cell where a token begins."""
        return self._settled.get(token) or self._open[token]

    def at(self, line: int, cell: int) -> int | None:
        """The token at a cell; the line's last one right of its end; None below all lines."""
        if not 0 <= line < len(self.lines):
            return None
        x = 0
        for run in self.lines[line]:
            x += run.cells
            if cell < x:
                return run.token
        return self.lines[line][-1].token

    def _break_paragraph(self) -> None:
        del self.lines[self._paragraph_line :]
        self._open = {}
        for characters in _broken(self._paragraph, self.width):
            self._add_line(characters)

    def _end_paragraph(self) -> None:
        self._break_paragraph()
        # A token that goes on behind the line end began where it began.
        for token, where in self._open.items():
            self._settled.setdefault(token, where)
        self._paragraph_line, self._paragraph = len(self.lines), []

    def _add_line(self, characters: Sequence[_Cell]) -> None:
        line: Line = []
        x = 0
        for character, token in characters:
            self._open.setdefault(token, (len(self.lines), x))
            cells = get_character_cell_size(character)
            if line and line[-1].token == token:
                line[-1] = Run(token, line[-1].text + character, line[-1].cells + cells)
            else:
                line.append(Run(token, character, cells))
            x += cells
        self.lines.append(line)


def _broken(characters: Sequence[_Cell], width: int) -> list[Sequence[_Cell]]:
    """Lines of at most `width` cells, broken behind a space where there is one.

    The last cell of a line is left to a space, so that a word's space stays with the line.
    """
    lines: list[Sequence[_Cell]] = []
    start = behind_space = 0
    x = 0
    for index, (character, _) in enumerate(characters):
        cells = get_character_cell_size(character)
        if x + cells > (width if character == " " else width - 1):
            end = behind_space if behind_space > start else index
            lines.append(characters[start:end])
            start = end
            x = sum(get_character_cell_size(c) for c, _ in characters[start:index])
        x += cells
        if character == " ":
            behind_space = index + 1
    if start < len(characters):
        lines.append(characters[start:])
    return lines
