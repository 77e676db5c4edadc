"""Data files to rows: every form, what is drawn, and where a bad row is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.protocol import Message
from engine.training.row_files import DataError
from engine.training.rows import Row, parse_spec, read_questions, read_rows, read_split

Write = Callable[..., Path]
QUESTION = Message("user", "ask")
CHAT = (QUESTION, Message("assistant", "say"))


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": turns(("user", "ask"), ("assistant", "say"))}, CHAT),
        ({"query": "ask", "response": "say"}, CHAT),
        ({"instruction": "ask", "input": "", "output": "say"}, CHAT),
        (
            {"instruction": "ask", "input": "this", "output": "say"},
            (Message("user", "ask\nthis"), CHAT[1]),
        ),
        ({"system": "be", "query": "ask", "response": "say"}, (Message("system", "be"), *CHAT)),
        ({"query": "ask", "text": "a column of one's own"}, (QUESTION,)),
        ({"messages": turns(("developer", "be"))}, (Message("system", "be"),)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "ask"}]}]},
         (QUESTION,)),
        ({"custom_id": "a", "body": {"messages": turns(("user", "ask"))}}, (QUESTION,)),
        ({"prompt": "ask", "max_tokens": 3}, (QUESTION,)),
    ],
)  # fmt: skip
def test_every_form_of_a_row_is_understood(
    jsonl: Write, record: dict[str, Any], messages: tuple[Message, ...]
) -> None:
    (row,) = read_rows(jsonl(record))
    assert row.messages == messages


def test_files_of_every_kind_hold_the_same_rows(tmp_path: Path) -> None:
    texts = {
        "a.jsonl": '{"query": "ask", "response": "say"}\n\n{"query": "b\u2028", "response": "c"}\n',
        "a.json": '[{"query": "ask", "response": "say"},\n {"query": "b\u2028", "response": "c"}]',
        "a.csv": 'query,response,more\nask,say,\n\n"b\u2028","c",x\n',
        "b.csv": 'messages\n"[{""role"": ""user"", ""content"": ""ask""},'
        '{""role"": ""assistant"", ""content"": ""say""}]"\n',
    }
    found = {}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        found[name] = [row.messages for row in read_rows(tmp_path / name)]
    rest = (Message("user", "b\u2028"), Message("assistant", "c"))
    assert found["a.jsonl"] == found["a.json"] == found["a.csv"] == [CHAT, rest]
    assert found["b.csv"] == [CHAT]


def test_plain_text_is_read_by_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\ufeffOne line\nand more\n\n\nAnother\n")
    rows = read_rows(path)
    assert [(row.text, row.where) for row in rows] == [
        ("One line\nand more", f"{path}: line 1"),
        ("Another", f"{path}: line 5"),
    ]


def test_a_row_is_known_by_its_id_or_its_file_and_line(jsonl: Write) -> None:
    rows = read_rows(jsonl({"id": 7, "text": "a"}, {"text": "b"}))
    assert [row.id for row in rows] == ["7", "data.jsonl:2"]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', "line 2: key 'text': must be a string, got 3"),
        ("a.jsonl", '{"text": "a"}\n{"tex', "line 2: not JSON: Unterminated string"),
        ("a.jsonl", "[1]\n", "line 1: must be a JSON object, got [1]"),
        ("a.jsonl", '{"a": 1}\n', 'line 1: none of the forms {"messages": [...]}'),
        ("a.jsonl", '{"messages": []}\n', "line 1: key 'messages': must be a list of messages"),
        ("a.jsonl", '{"messages": [{"role": "robot"}]}\n', "line 1: key 'messages[0]': must have"),
        ("a.jsonl", '{"query": "a", "response": "\\ud800"}\n', "holds half of a surrogate pair"),
        ("a.jsonl", '{"query": 1}\n\n{"query": 2}\n', "line 1: key 'query': must be"),
        ("a.jsonl", '{"query": 1}\n\n{"query": 2}\n', " (and 1 more bad row)"),
        ("a.json", '[{"text": "a"},\n\n{"text": 3}\n]', "line 3: key 'text'"),
        ("a.json", '[{"text": "a"}\n{"text": "b"}]', "line 2: not JSON: ',' or ']' expected"),
        ("a.json", '[{"text": "a"},\n{"text" "b"}]', "line 2: not JSON"),
        ("a.csv", 'query,response\n"a\nb",c\na,b,c\n', "line 4: 3 cells, the header has 2"),
        ("a.csv", "text\n\"a\" b\n", "line 2: not CSV"),
        ("a.txt", "a\n\n\udcff\n", "line 3: not UTF-8"),
        ("a.parquet", "", "not a data file; the kinds are .jsonl, .json, .csv, .txt"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line(
    tmp_path: Path, name: str, text: str, problem: str
) -> None:
    path = tmp_path / name
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_wrong_number_of_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl: No such file"):
        read_rows(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match=r"write path#N for N rows of it"):
        parse_spec(f"{tmp_path}/no.jsonl#0")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no rows"):
        read_split([str(tmp_path / "empty.jsonl")], seed=1)


def test_an_existing_path_wins_over_the_split_at_the_number_sign(jsonl: Write) -> None:
    plain, odd = jsonl({"text": "a"}), jsonl({"text": "b"}, name="data.jsonl#2")
    assert parse_spec(f"{plain}#3") == (plain, 3)
    assert parse_spec(str(odd)) == (odd, None)
    assert parse_spec(f"{odd}#4") == (odd, 4)


def ids(rows: list[Row]) -> list[str]:
    return [row.id for row in rows]


@pytest.fixture
def hundred(jsonl: Write) -> Path:
    return jsonl(*({"id": f"r{number}", "text": "a"} for number in range(100)))


def test_rows_are_drawn_with_the_seed_and_repeat_where_there_are_too_few(hundred: Path) -> None:
    everything = ids(read_split([str(hundred)], seed=1))
    assert everything == [f"r{number}" for number in range(100)]
    ten = ids(read_split([f"{hundred}#10"], seed=1))
    assert len(set(ten)) == 10
    assert ten == ids(read_split([f"{hundred}#10"], seed=1))
    assert ten != ids(read_split([f"{hundred}#10"], seed=2))
    more = Counter(ids(read_split([f"{hundred}#250"], seed=1)))
    assert sorted(more.values()) == [2] * 50 + [3] * 50
    both = ids(read_split([f"{hundred}#10", f"{hundred}#10"], seed=1))
    assert both[:10] == ten != both[10:]


@pytest.mark.parametrize("number", ["", "#40", "#300"])
def test_held_out_rows_are_never_trained_on(hundred: Path, number: str) -> None:
    spec = [f"{hundred}{number}"]
    held = ids(read_split(spec, seed=3, split="eval", held_out=0.1))
    train = ids(read_split(spec, seed=3, held_out=0.1))
    assert len(held) == {"": 10, "#40": 4, "#300": 10}[number]
    assert not set(held) & set(train)
    assert len(train) == {"": 90, "#40": 40, "#300": 300}[number]
    whole = ids(read_split([str(hundred)], seed=3, split="eval", held_out=0.1))
    assert set(held) <= set(whole)


def test_a_share_that_is_less_than_a_row_still_holds_one_out(jsonl: Write) -> None:
    spec = [str(jsonl({"text": "a"}, {"text": "b"}))]
    assert len(read_split(spec, seed=1, split="eval", held_out=0.01)) == 1
    assert len(read_split(spec, seed=1, held_out=0.01)) == 1
    assert read_split(spec, seed=1, split="eval", held_out=0.0) == []


def answer(custom_id: str, content: str, reason: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    body = {"choices": [{"message": message, "finish_reason": reason}]}
    return {"custom_id": custom_id, "response": {"body": body}, "error": None}


def test_answers_of_a_batch_are_joined_with_their_questions(jsonl: Write) -> None:
    asked = jsonl({"custom_id": "a", "prompt": "ask"}, {"prompt": "more"}, name="in.jsonl")
    failed = {"custom_id": "a", "response": None, "error": {"code": "x", "message": "y"}}
    out = jsonl(answer("line-2", "yes", "length"), failed, answer("a", "say"))
    rows = read_rows(out, read_questions([str(asked)]))
    assert [(row.messages, row.cut) for row in rows] == [
        ((Message("user", "more"), Message("assistant", "yes")), True),
        (CHAT, False),
    ]


def test_an_answer_of_a_batch_without_its_question_is_named(jsonl: Write) -> None:
    out = jsonl(answer("b", "say"))
    with pytest.raises(DataError, match=r"line 1: .*'b', is elsewhere; name its input with --batc"):
        read_rows(out)
    with pytest.raises(DataError, match=r"line 1: .*'b', is not in what --batch_input names"):
        read_rows(out, {"a": (QUESTION,)})


def test_an_answer_that_was_cut_says_so(jsonl: Write) -> None:
    chat = turns(("user", "ask"), ("assistant", "say"))
    made = {"id": "a", "messages": chat, "finish_reason": "length", "generated_by": {}}
    (row,) = read_rows(jsonl(json.loads(json.dumps(made))))
    assert row.cut
