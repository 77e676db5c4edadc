"""Code in parts: coloured as in one piece, and cut only where nothing is open."""

from __future__ import annotations

import pytest
from textual.content import Content

from tui.code_parts import LONGEST_PART, PART_LINES, Look, Part, parts_of

DARK = Look(ansi=False, dark=True)


def whole(parts: list[Part]) -> str:
    return "\n".join(part.content.plain for part in parts)


def styles_of(line: str, parts: list[Part]) -> list[tuple[str, object]]:
    """What is coloured how in the first line that is `line`."""
    lines = Content("\n").join([part.content for part in parts]).split("\n")
    content = next(found for found in lines if found.plain == line)
    return [(line[span.start : span.end], span.style) for span in content.spans]


PYTHON = [f"    total_{n} = len('text {n}')  # comment {n}" for n in range(3 * PART_LINES)]


def test_the_parts_together_are_the_code_and_only_the_last_may_be_short() -> None:
    parts = parts_of(PYTHON, "python", DARK)
    assert whole(parts) == "\n".join(PYTHON)
    assert sum(part.lines for part in parts) == len(PYTHON)
    assert len(parts) > 2 and all(part.lines >= PART_LINES for part in parts[:-1])


@pytest.mark.parametrize("language", ["python", "json", "text", "", "no-such-language"])
def test_any_language_named_or_not_keeps_its_text(language: str) -> None:
    lines = ['{"a": [1, 2]}', "", "  <b>", "a\tb", ""] * 20
    assert whole(parts_of(lines, language, DARK)) == "\n".join(lines).expandtabs(4)


def test_what_follows_changes_the_last_part_only() -> None:
    for length in range(1, len(PYTHON)):
        shorter = parts_of(PYTHON[:length], "python", DARK)
        longer = parts_of(PYTHON[: length + 1], "python", DARK)
        finished = [part.content.plain for part in shorter[:-1]]
        assert [part.content.plain for part in longer[: len(finished)]] == finished


def test_a_line_has_the_same_colours_in_a_part_as_in_the_whole() -> None:
    rest = parts_of(PYTHON[PART_LINES:], "python", DARK)
    for line in (PYTHON[PART_LINES], PYTHON[-1]):
        assert styles_of(line, rest) == styles_of(line, parts_of(PYTHON, "python", DARK))


def test_no_cut_is_within_a_string_of_many_lines() -> None:
    lines = ["text = '''", *["inside"] * 2 * PART_LINES, "'''", *["after = 1"] * PART_LINES, "x"]
    parts = parts_of(lines, "python", DARK)
    assert parts[0].content.plain.endswith("'''")
    assert styles_of("after = 1", parts) == styles_of(
        "after = 1", parts_of(lines[-2:], "python", DARK)
    )


def test_even_a_very_long_string_is_cut_at_last() -> None:
    lines = ["text = '''", *["inside"] * (2 * LONGEST_PART)]
    assert max(part.lines for part in parts_of(lines, "python", DARK)) <= LONGEST_PART


def test_ansi_themes_have_colours_of_their_own() -> None:
    def styles(look: Look) -> set[object]:
        return {
            span.style
            for part in parts_of(PYTHON[:1], "python", look)
            for span in part.content.spans
        }

    assert any("ansi_" in str(style) for style in styles(Look(ansi=True, dark=True)))
    assert not any("ansi_" in str(style) for style in styles(DARK))
