"""Rows of data sets: what the forms of a record mean, and which rows of a file are taken."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from engine.errors import shown
from engine.protocol import Message
from engine.training.row_files import DataError, read_records

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
FORMS = '{"messages": [...]}, {"query", "response"}, {"instruction", "input", "output"}, {"text"}'
CHAT_KEYS = ("messages", "query", "instruction", "prompt", "body")
Split = Literal["train", "eval"]
Questions = Mapping[str, tuple[Message, ...]]
"""Messages of the requests of a batch, by custom_id."""


@dataclass(frozen=True)
class Row:
    """One row: a conversation (`messages`), or a text to be learnt whole."""

    where: str
    """File and line, for errors."""
    id: str
    """The row's own `id`, or file and line."""
    messages: tuple[Message, ...] = ()
    text: str | None = None
    cut: bool = False
    """The last answer ended at a length limit: what follows it is not to be learnt."""
    tag: str = ""
    """The row's own `tag`: its language in data for self-cognition."""


class _RowError(Exception):
    """What is wrong with one row."""


def read_split(
    specs: Sequence[str],
    *,
    seed: int,
    split: Split = "train",
    held_out: float = 0.0,
    questions: Questions | None = None,
) -> list[Row]:
    """The rows that `path[#N]` specs name, for training or held out for evaluation.

    Without N the rows stay in file order. N rows are drawn with the seed; where N is more than
    there are, rows repeat. Held-out rows are the same for every N at one seed and never among
    those for training.

    Raises:
        DataError: a file or row that cannot be used, named with its line.
    """
    rows: list[Row] = []
    for index, spec in enumerate(specs):
        path, wanted = parse_spec(spec)
        found = read_rows(path, questions)
        if not found:
            raise DataError(f"{path}: holds no rows")
        dice = random.Random(f"{seed}/{index}")
        rows += _take(found, wanted, split, held_out, dice)
    return rows


def _take(
    rows: list[Row], wanted: int | None, split: Split, held_out: float, dice: random.Random
) -> list[Row]:
    order = list(range(len(rows)))
    dice.shuffle(order)
    some = round(held_out * len(rows))
    if held_out > 0 and len(rows) > 1:
        some = min(max(1, some), len(rows) - 1)
    if split == "eval":
        share = some if wanted is None else min(some, max(1, round(held_out * wanted)))
        return [rows[index] for index in order[:share]]
    rest = order[some:]
    if wanted is None:
        return [rows[index] for index in sorted(rest)]
    return [rows[rest[index % len(rest)]] for index in range(wanted)]


def parse_spec(spec: str) -> tuple[Path, int | None]:
    """Path and number of rows of `path[#N]`; an existing path wins over the split at `#`.

    Raises DataError.
    """
    whole = Path(spec).expanduser()
    name, hash_sign, number = spec.rpartition("#")
    if whole.exists() or not hash_sign:
        return whole, None
    if not (number.isascii() and number.isdigit() and int(number) > 0):
        raise DataError(f"{spec}: no such file; write path#N for N rows of it, N from 1")
    return Path(name).expanduser(), int(number)


def read_rows(path: Path, questions: Questions | None = None) -> list[Row]:
    """All rows of a file in its order; see FORMS, docs/training.md and `read_records`.

    Failed lines of a batch's output are left out.

    Raises:
        DataError: the first bad row, by file and line, and how many more there are.
    """
    rows: list[Row] = []
    problems: list[str] = []
    for found in _try_rows(path, questions):
        if isinstance(found, Row):
            rows.append(found)
        else:
            problems.append(found)
    if problems:
        more = len(problems) - 1
        rest = f" (and {more} more bad {'row' if more == 1 else 'rows'})" if more else ""
        raise DataError(problems[0] + rest)
    return rows


def stream_rows(path: Path, questions: Questions | None = None) -> Iterator[Row]:
    """The rows of a file as they are read. Raises DataError at a bad row, when it is its turn."""
    for found in _try_rows(path, questions):
        if not isinstance(found, Row):
            raise DataError(found)
        yield found


def _try_rows(path: Path, questions: Questions | None) -> Iterator[Row | str]:
    """The rows of a file, or what is wrong with one."""
    for line, record in read_records(path):
        try:
            row = _row(path, line, record, questions)
        except _RowError as problem:
            yield f"{path}: line {line}: {problem}"
            continue
        if row is not None:
            yield row


def read_questions(paths: Iterable[str]) -> dict[str, tuple[Message, ...]]:
    """The chat requests of batch inputs by custom_id, as `jupiter-tui --batch` names them.

    Raises DataError.
    """
    found: dict[str, tuple[Message, ...]] = {}
    for name in paths:
        path = Path(name).expanduser()
        for line, record in read_records(path):
            try:
                messages = _conversation(record)
            except _RowError as problem:
                raise DataError(f"{path}: line {line}: {problem}") from None
            custom_id = record.get("custom_id") or f"line-{line}"
            if found.setdefault(custom_id, messages) != messages:
                raise DataError(f"{path}: line {line}: custom_id {custom_id!r} is there twice")
    return found


def with_system(row: Row, system: str | None) -> Row:
    """The row with this system message, unless it has one or is a text."""
    if system is None or not row.messages or row.messages[0].role == "system":
        return row
    return replace(row, messages=(Message("system", system), *row.messages))


def _conversation(record: Any) -> tuple[Message, ...]:
    """The messages of a record, its answers included where it has some; also of batch requests."""
    record = _object(record)
    if isinstance(record.get("body"), dict):  # an OpenAI batch line
        record = record["body"]
    if "messages" in record:
        return _messages(record["messages"])
    if "query" in record or "instruction" in record:
        return _pair(record)
    if "prompt" in record:
        return (Message("user", _string("prompt", record["prompt"])),)
    raise _RowError(f"none of the forms {FORMS}")


def _row(path: Path, line: int, record: Any, questions: Questions | None) -> Row | None:
    where = f"{path}: line {line}"
    if isinstance(record, str):
        return Row(where, f"{path.name}:{line}", text=_string("text", record))
    record = _object(record)
    if "custom_id" in record and "response" in record and "query" not in record:
        return _batch_answer(where, record, questions)
    name = record.get("id", record.get("custom_id"))
    name = f"{path.name}:{line}" if name is None else str(name)
    tag = str(record.get("tag") or "")
    if "text" in record and not any(key in record for key in CHAT_KEYS):
        return Row(where, name, text=_string("text", record["text"]), tag=tag)
    cut = record.get("finish_reason") == "length"
    return Row(where, name, messages=_conversation(record), cut=cut, tag=tag)


def _object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise _RowError(f"must be a JSON object, got {shown(record)}")
    return record


def _pair(record: dict[str, Any]) -> tuple[Message, ...]:
    """Question and answer, the latter where there is one."""
    turns: list[Message] = []
    if record.get("system"):
        turns.append(Message("system", _string("system", record["system"])))
    if "query" in record:
        question, answers = _string("query", record["query"]), "response"
    else:
        answers = "output"
        parts = [_string(key, record.get(key) or "") for key in ("instruction", "input")]
        question = "\n".join(filter(None, parts))
    turns.append(Message("user", question))
    if record.get(answers) is not None:
        turns.append(Message("assistant", _string(answers, record[answers])))
    return tuple(turns)


def _messages(value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):  # in a cell of a CSV file
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _RowError("key 'messages': not JSON") from None
    if not isinstance(value, list) or not value:
        raise _RowError(f"key 'messages': must be a list of messages, got {shown(value)}")
    return tuple(_message(f"messages[{at}]", message) for at, message in enumerate(value))


def _message(where: str, value: Any) -> Message:
    role = value.get("role") if isinstance(value, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise _RowError(f"key '{where}': must have a role ({', '.join(ROLES)}) and a content")
    content = value.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        content = "\n".join(_string(f"{where}.content", part.get("text")) for part in content)
    known = cast(Literal["system", "user", "assistant"], ROLES[role])
    return Message(known, _string(f"{where}.content", content))


def _batch_answer(where: str, record: dict[str, Any], questions: Questions | None) -> Row | None:
    """A line of `jupiter-tui --batch`, which holds the answer alone; None for a failed one."""
    if record.get("error") is not None:
        return None
    custom_id = str(record["custom_id"])
    asked = None if questions is None else questions.get(custom_id)
    if asked is None:
        missing = "is not in what --batch_input names"
        hint = missing if questions else "is elsewhere; name its input with --batch_input"
        raise _RowError(f"an answer of --batch whose question, {custom_id!r}, {hint}")
    try:
        choice = record["response"]["body"]["choices"][0]
        content, reason = choice["message"]["content"], choice["finish_reason"]
    except (KeyError, IndexError, TypeError):
        raise _RowError("not the output line of a chat request") from None
    answer = Message("assistant", _string("content", content))
    return Row(where, custom_id, messages=(*asked, answer), cut=reason == "length")


def _string(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _RowError(f"key '{key}': must be a string, got {shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair; no text can hold it
        raise _RowError(f"key '{key}': holds half of a surrogate pair") from None
    return value
