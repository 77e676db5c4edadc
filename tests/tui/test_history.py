"""Prompts that come back with Up and Down."""

from __future__ import annotations

from pathlib import Path

import pytest

from tui.history import KEPT, PromptHistory


def test_older_and_newer_prompts_and_the_draft_at_the_end(tmp_path: Path) -> None:
    history = PromptHistory(tmp_path / "h")
    for prompt in ("one", "two\nlines", "two\nlines"):
        history.add(prompt)
    assert history.older("draft") == "two\nlines"
    assert history.older("two\nlines") == "one"
    assert history.older("one") is None
    assert history.newer() == "two\nlines"
    assert history.newer() == "draft"
    assert history.newer() is None


def test_the_next_run_has_them_in_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "state" / "h"
    PromptHistory(path).add("hello “you”")
    assert list(PromptHistory(path).prompts) == ["hello “you”"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_two_runs_at_a_time_keep_both_prompts(tmp_path: Path) -> None:
    first, second = PromptHistory(tmp_path / "h"), PromptHistory(tmp_path / "h")
    first.add("a")
    second.add("b")
    assert list(PromptHistory(tmp_path / "h").prompts) == ["a", "b"]


def test_broken_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "h").write_bytes(b'"fine"\n{"not": "text"}\n\xff\n"cut of\n"too"\n')
    assert list(PromptHistory(tmp_path / "h").prompts) == ["fine", "too"]


def test_only_the_last_prompts_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "h"
    path.write_text("".join(f'"{n}{"x" * 80}"\n' for n in range(2 * KEPT)))
    PromptHistory(path).add("last")
    assert len(path.read_text().splitlines()) == KEPT
    assert PromptHistory(path).older("") == "last"


def test_a_history_that_cannot_be_written_holds_for_this_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    history = PromptHistory(tmp_path / "file" / "h")
    with pytest.raises(OSError):
        history.add("x")
    assert history.older("") == "x"
