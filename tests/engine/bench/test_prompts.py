"""Which prompts the decode bench takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.bench.prompts import FILE_VARIABLE, OWN, choose_prompts, read_chats, spread
from engine.errors import ConfigError
from engine.protocol import Message


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def user(text: str) -> Message:
    return Message("user", text)


def test_a_line_is_read_up_to_its_first_question(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"))]
    file = write(tmp_path / "f.jsonl", {"id": 1, "messages": [system, *turns]}, "", {"prompt": "c"})
    assert read_chats(file) == [(Message("system", "Be brief."), user("a")), (user("c"),)]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '"text"',
        '{"text": "a"}',
        '{"messages": 3}',
        '{"messages": []}',
        '{"messages": [{"role": "system", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": 1}]}',
    ],
)
def test_a_line_that_is_no_chat_is_named(tmp_path: Path, line: str) -> None:
    file = write(tmp_path / "f.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(ConfigError, match=r"f\.jsonl:2: must be"):
        read_chats(file)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no prompts"):
        read_chats(write(tmp_path / "f.jsonl", ""))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_chats(tmp_path / "none.jsonl")


def test_the_file_goes_before_the_variable_and_that_before_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    source, chats = choose_prompts(None, None)
    assert "own" in source
    assert [chat[0].content for chat in chats] == list(OWN)
    monkeypatch.setenv(FILE_VARIABLE, str(write(tmp_path / "v.jsonl", {"prompt": "v"})))
    assert choose_prompts(None, None) == ("v.jsonl", [(user("v"),)])
    given = write(tmp_path / "g.jsonl", {"prompt": "g"})
    assert choose_prompts(str(given), None) == ("g.jsonl", [(user("g"),)])


def test_a_limit_takes_prompts_evenly() -> None:
    chats = [(user(str(i)),) for i in range(10)]
    assert [chat[0].content for chat in spread(chats, 4)] == ["0", "2", "5", "7"]
    assert spread(chats, 10) == spread(chats, 99) == spread(chats, None) == chats
