"""A conversation as Markdown and as OpenAI's JSON, and its code blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.protocol import SamplingParams
from tui.conversation import Conversation, Ending
from tui.export import closed, code_blocks, export, file_name, to_markdown, to_openai
from tui.store import StoreError


@pytest.fixture
def talk() -> Conversation:
    made = Conversation(system="Be brief.\nBe kind.", params=SamplingParams(temperature=0.0))
    first = made.ask("Show me code")
    first.text = "Here:\n\n```python\nx = 1"
    made.end(first, Ending.CANCELLED)
    left = made.ask("far too long")
    made.end(left, Ending.REFUSED)
    return made


def test_markdown_tells_the_shown_branch_and_how_answers_ended(talk: Conversation) -> None:
    assert to_markdown(talk) == (
        "# Show me code\n\n## System prompt\n\n> Be brief.\n> Be kind.\n\n"
        "## You\n\nShow me code\n\n## Answer\n\nHere:\n\n```python\nx = 1\n```\n\n*(stopped)*\n\n"
        "## You\n\nfar too long\n\n## Answer\n\n*(not finished)*\n"
    )


def test_json_is_a_chat_completion_request_with_the_settings(talk: Conversation) -> None:
    assert json.loads(to_openai(talk, "some/model")) == {
        "model": "some/model",
        "messages": [
            {"role": "system", "content": "Be brief.\nBe kind."},
            {"role": "user", "content": "Show me code"},
            {"role": "assistant", "content": "Here:\n\n```python\nx = 1"},
            {"role": "user", "content": "far too long"},
        ],
        "temperature": 0.0,
    }


def test_only_the_shown_branch_is_exported(talk: Conversation) -> None:
    talk.ask("Something else", after=0)
    assert "Show me code\n\n" not in to_markdown(talk).partition("## You")[2]


def test_the_ending_of_the_name_says_in_which_form(talk: Conversation, tmp_path: Path) -> None:
    for name in ("out.md", "out.json"):
        export(talk, "m", tmp_path / name)
    assert (tmp_path / "out.md").read_text() == to_markdown(talk)
    assert (tmp_path / "out.json").read_text() == to_openai(talk, "m")


@pytest.mark.parametrize(
    ("name", "told"),
    [("out.txt", r"\.md or \.json"), ("there.md", "exists already"), ("no/out.md", "No such file")],
)
def test_a_file_that_cannot_be_is_refused_in_one_line(
    name: str, told: str, talk: Conversation, tmp_path: Path
) -> None:
    (tmp_path / "there.md").write_text("mine")
    with pytest.raises(StoreError, match=told):
        export(talk, "m", tmp_path / name)
    assert (tmp_path / "there.md").read_text() == "mine"


def test_a_suggested_name_is_free_and_plain(talk: Conversation, tmp_path: Path) -> None:
    talk.name = "../Ünter: a/b?"
    assert file_name(talk, "md", tmp_path) == tmp_path / "ünter-a-b.md"
    (tmp_path / "ünter-a-b.md").write_text("")
    assert file_name(talk, "md", tmp_path) == tmp_path / "ünter-a-b-2.md"


def test_an_open_fence_is_closed_and_a_closed_one_left() -> None:
    assert closed("~~~~\nx\n~~~") == "~~~~\nx\n~~~\n~~~~"
    whole = "```\nx\n```\nand `y`"
    assert closed(whole) == whole


def test_code_blocks_are_found_where_markdown_has_them() -> None:
    text = "```python title\na\n```\n\n- item\n\n  ```\n  b\n  ```\n\nNo `c` here.\n\n~~~sh\nd"
    assert [(b.language, b.text) for b in code_blocks(text)] == [
        ("python", "a\n"),
        ("", "b\n"),
        ("sh", "d"),
    ]
