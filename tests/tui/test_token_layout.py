"""Tokens broken into lines, and found there again."""

from __future__ import annotations

import pytest

from tui.speculation import TracedToken
from tui.token_layout import TokenLayout, visible


def tokens(*texts: str) -> list[TracedToken]:
    return [TracedToken(text, text, 0, 0) for text in texts]


def laid_out(width: int, *texts: str) -> TokenLayout:
    layout = TokenLayout(width)
    layout.add(tokens(*texts))
    return layout


def shown(layout: TokenLayout) -> list[str]:
    return ["".join(run.text for run in line) for line in layout.lines]


def test_lines_are_broken_behind_spaces_and_long_words_anywhere() -> None:
    assert shown(laid_out(10, "one", " two", " three", " four")) == ["one two ", "three ", "four"]
    assert shown(laid_out(10, "abcdefghijklmnop")) == ["abcdefghi", "jklmnop"]
    assert shown(laid_out(6, "日本語日本")) == ["日本", "語日", "本"]


def test_line_ends_tabs_and_empty_tokens_can_be_seen() -> None:
    assert shown(laid_out(20, "a\n\nb", "\t", "", "\x1b[2J")) == ["a↵", "↵", "b    ◦␛[2J"]
    assert visible("\n\t x ") == "↵⇥ x·"
    assert visible("  in the  ") == "··in the··"
    assert visible("   ") == "···"
    assert visible("") == "◦"


def test_growing_by_any_pieces_gives_the_lines_of_the_whole() -> None:
    texts = ["Some", " words", ",", "\n\n", "and", " more", " of", "\n  them", ".", "", " End"] * 9
    whole = laid_out(12, *texts)
    growing = TokenLayout(12)
    for size in range(len(texts) + 1):
        before = shown(growing)
        changed = growing.add(tokens(*texts[:size]))
        assert shown(growing)[:changed] == before[:changed]
    assert growing.lines == whole.lines
    assert [growing.place(t) for t in range(len(texts))] == [
        whole.place(t) for t in range(len(texts))
    ]


@pytest.mark.parametrize("width", [4, 7, 12, 80])
def test_a_token_is_found_where_it_is_placed(width: int) -> None:
    texts = ["Some", " words", "\n\n", "日本", " and", "\nmore", "", "."]
    layout = laid_out(width, *texts)
    for token in range(len(texts)):
        assert layout.at(*layout.place(token)) == token


def test_right_of_a_line_is_its_last_token_and_below_all_is_none() -> None:
    layout = laid_out(10, "one", " two", "\n", "three")
    assert layout.at(0, 9) == 2
    assert layout.at(9, 0) is None
    assert layout.at(-1, 0) is None
