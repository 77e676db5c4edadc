"""The file of self-distilled answers: whole lines, whatever ended the run before."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from engine.protocol import Message
from engine.training.answer_file import AnswerFile, AnswerFileError, AnswersLostError
from engine.training.args_medusa import GenerateArguments
from engine.training.generate import Prompt, read_prompts
from engine.training.row_files import DataError
from engine.training.rows import read_rows

BY = {"model": "tiny", "temperature": 0.0}
CHAT = (Message("user", "ask\u2028"), Message("assistant", "say"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, BY) as file:
        file.write("a", CHAT, "stop")
        file.write("b", (*CHAT, *CHAT), "length")
    return path


def test_what_is_written_is_training_data_and_known_again(path: Path) -> None:
    rows = read_rows(path)
    assert [(row.id, row.messages, row.cut) for row in rows] == [
        ("a", CHAT, False),
        ("b", (*CHAT, *CHAT), True),
    ]
    assert len(path.read_text().splitlines()) == 2
    with AnswerFile(path, BY) as file:
        assert file.done == {"a": ("ask\u2028",), "b": ("ask\u2028", "ask\u2028")}


@pytest.mark.parametrize("torn", [b'{"id": "c", "mess', b"\0\0\0"])
def test_a_half_line_at_the_end_is_taken_out(path: Path, torn: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with AnswerFile(path, BY) as file:
        assert set(file.done) == {"a", "b"}
        file.write("c", CHAT, "stop")
    assert path.read_bytes().startswith(whole)
    assert [row.id for row in read_rows(path)] == ["a", "b", "c"]


@pytest.mark.parametrize("text", ['{"text": "a"}\n', "a letter"])
def test_another_file_is_refused_and_stays_as_it_was(tmp_path: Path, text: str) -> None:
    path = tmp_path / "letter.jsonl"
    path.write_text(text)
    with pytest.raises(AnswerFileError, match="line 1: not a line that this command writes"):
        AnswerFile(path, BY)
    assert path.read_text() == text


def test_answers_made_in_another_way_are_not_mixed_with(path: Path) -> None:
    with pytest.raises(AnswerFileError, match=r"line 1: was made by .*0\.0.*not by .*0\.7"):
        AnswerFile(path, {**BY, "temperature": 0.7})


def test_a_second_run_on_the_same_file_is_refused(path: Path) -> None:
    with AnswerFile(path, BY), pytest.raises(AnswerFileError, match="another run is writing it"):
        AnswerFile(path, BY)


def test_a_line_that_does_not_fit_the_disk_leaves_no_part_of_itself(path: Path) -> None:
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnswerFile(path, BY) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limits[1]))
        try:
            with pytest.raises(AnswersLostError, match="cannot write: File too large"):
                file.write("c", CHAT, "stop")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


def test_what_is_no_file_is_refused() -> None:
    with pytest.raises(AnswerFileError, match="/dev/null: is no regular file"):
        AnswerFile(Path("/dev/null"), BY)


def prompts(path: Path, *records: object, **more: object) -> list[Prompt]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_prompts(GenerateArguments(dataset=[str(path)], **more))  # type: ignore[arg-type]


def test_prompts_are_the_users_messages_alone(tmp_path: Path) -> None:
    chat = [
        {"role": role, "content": text}
        for role, text in [("system", "be"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    ]
    found = prompts(
        tmp_path / "p.jsonl",
        {"id": "x", "messages": chat},
        {"query": "d", "response": "e"},
        {"query": "d", "response": "e"},
        system="given",
    )
    assert found == [
        Prompt("x", "be", ("a", "c")),
        Prompt("p.jsonl:2", "given", ("d",)),
        Prompt("p.jsonl:3", "given", ("d",)),
    ]


def test_an_id_is_asked_once_and_never_twice_something_else(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    same = {"id": "x", "query": "a"}
    assert prompts(path, same, same) == [Prompt("x", None, ("a",))]
    assert len(prompts(path, same, {"id": "y", "query": "a"}, limit=1)) == 1
    with pytest.raises(DataError, match=r"line 2: id 'x' is already that of .*line 1"):
        prompts(path, same, {"id": "x", "query": "b"})
    with pytest.raises(DataError, match="line 1: has no user message to answer"):
        prompts(path, {"text": "a"})
