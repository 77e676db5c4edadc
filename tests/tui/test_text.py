"""Nothing that a model, a log or a paste says is obeyed by the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from tui.text import harmless, log_text, pasted, short_path


def test_control_characters_become_visible() -> None:
    assert harmless("\x1b[2J a\x07b\x00") == "␛[2J a␇b␀"
    assert harmless("\x9b31m\x7f") == "\ufffd31m␡"


def test_new_lines_and_tabs_stay_and_carriage_returns_go() -> None:
    assert harmless("a\tb\r\nc") == "a\tb\nc"


def test_direction_overrides_cannot_reorder_a_line() -> None:
    assert "\u202e" not in harmless("user\u202egnp.exe\u2066x")


@pytest.mark.parametrize("code", [*range(0x20), 0x7F, *range(0x80, 0xA0), 0x2028, 0x2029])
def test_markdown_and_python_agree_on_the_lines_of_harmless_text(code: int) -> None:
    text = harmless(f"a{chr(code)}b")
    assert len(text.splitlines()) == text.count("\n") + 1


def test_a_stream_is_harmless_however_it_is_cut() -> None:
    text = "x\x1b]0;title\x07y\r\nz\u202e"
    assert "".join(harmless(char) for char in text) == harmless(text)


def test_colour_codes_of_a_log_are_taken_out() -> None:
    assert log_text("\x1b[1;31mError\x1b[0m: \x1b]8;;http://x\x07link") == "Error: link"


def test_every_line_end_of_a_paste_is_a_new_line() -> None:
    assert pasted("a\r\nb\rc\nd") == "a\nb\nc\nd"


def test_a_path_is_told_from_where_the_user_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert short_path(tmp_path / "here" / "runs" / "v0") == "runs/v0"
    assert short_path(tmp_path / "home" / "runs") == "~/runs"
    assert short_path(tmp_path / "else") == str(tmp_path / "else")
    assert short_path(tmp_path / "here") == str(tmp_path / "here")
