"""Rows that are tokenized, or read, while training: the same for every rank, and gone on with."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.text import TextCodec
from engine.training import reading, tokenizing
from engine.training.ahead import ahead
from engine.training.args import TrainArguments, parse_arguments
from engine.training.args_check import validate
from engine.training.data import count_sequences, load_samples, micro_batches
from engine.training.reading import RowStream
from engine.training.row_files import DataError
from engine.training.template import Sample

Write = Callable[..., Path]


def args(path: Path | str, **more: Any) -> TrainArguments:
    values = {"global_batch_size": 4, "split_dataset_ratio": 0.0, "max_length": 60, **more}
    return TrainArguments(dataset=[str(path)], **values)


def texts(codec: TextCodec, batch: list[Sample]) -> list[str]:
    return [codec.tokenizer.decode(sample.tokens.tolist()) for sample in batch]


def taken(
    codec: TextCodec,
    given: TrainArguments,
    count: int,
    *,
    rank: int = 0,
    ranks: int = 1,
    at: int = 0,
) -> list[str]:
    """The texts of the next micro-batches of a rank."""
    samples = load_samples(given, codec, "train")
    batches = micro_batches(samples, args=given, dp_rank=rank, dp_size=ranks, consumed_samples=at)
    return [text for batch in islice(batches, count) for text in texts(codec, batch)]


@pytest.fixture
def letters(jsonl: Write) -> Path:
    return jsonl(*({"text": letter} for letter in "abcdefghij"))


def test_lazy_rows_are_those_that_are_tokenized_before(
    codec: TextCodec, letters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = taken(codec, args(letters), 12)
    monkeypatch.setattr(tokenizing, "tokenize_chunk", None)
    lazy = args(letters, lazy_tokenize=True)
    assert taken(codec, lazy, 12) == before
    assert count_sequences(load_samples(lazy, codec, "train"), lazy) == 10


def test_a_row_with_nothing_to_learn_makes_way(codec: TextCodec, jsonl: Write) -> None:
    data = jsonl({"query": "q" * 99, "response": "too long a question"}, {"text": "a"})
    for how in ({"lazy_tokenize": True}, {"streaming": True, "dataloader_type": "single"}):
        assert taken(codec, args(data, **how), 4) == ["a"] * 4
    nothing = jsonl({"query": "q" * 99, "response": "r"}, name="nothing.jsonl")
    with pytest.raises(DataError, match=r"nothing\.jsonl: line 1: neither it nor another"):
        taken(codec, args(nothing, lazy_tokenize=True), 1)


def test_a_stream_goes_round_in_an_order_of_its_own(
    codec: TextCodec, letters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK", 5)
    stream = args(letters, streaming=True)
    found = taken(codec, stream, 40)
    assert set(Counter(found).values()) == {4}
    assert found[:5] != sorted(found[:5]) and sorted(found[:5]) == list("abcde")
    assert found[:10] != found[10:20]  # each block is shuffled anew
    assert taken(codec, stream, 28, at=12) == found[12:]  # gone on with
    halves = [taken(codec, stream, 20, rank=rank, ranks=2) for rank in range(2)]
    assert [text for pair in zip(*halves, strict=True) for text in pair] == found
    single = args(f"{letters}#3", streaming=True, dataloader_type="single")
    assert taken(codec, single, 7) == list("abcabca")
    assert count_sequences(load_samples(stream, codec, "train"), stream) is None


def test_a_stream_is_packed_block_by_block(codec: TextCodec, letters: Path) -> None:
    packed = args(letters, streaming=True, packing=True, max_length=8)
    samples = load_samples(packed, codec, "train")
    assert isinstance(samples, RowStream)
    units = [samples[place] for place in range(3)]
    assert all(sum(map(len, unit)) <= 8 and len(unit) > 1 for unit in units)


def test_a_bad_row_of_a_stream_is_told_when_it_is_its_turn(codec: TextCodec, jsonl: Write) -> None:
    data = jsonl({"text": "a"}, {"text": 3})
    with pytest.raises(DataError, match=r"data\.jsonl: line 2: key 'text': must be a string"):
        taken(codec, args(data, streaming=True), 2)
    with pytest.raises(DataError, match=r"no\.jsonl: No such file"):
        load_samples(args("no.jsonl", streaming=True), codec, "train")


def test_rows_of_a_stream_are_only_held_out_by_a_file_of_their_own(
    codec: TextCodec, letters: Path
) -> None:
    assert not load_samples(args(letters, streaming=True, split_dataset_ratio=0.5), codec, "eval")
    own = args(letters, streaming=True, val_dataset=[f"{letters}#2"])
    assert len(load_samples(own, codec, "eval")) == 2


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["--streaming", "true"], "give --train_iters"),
        (["--lazy_tokenize", "true", "--packing", "true"], "packing has to know"),
        (
            ["--streaming", "true", "--train_iters", "5", "--split_dataset_ratio", "0.1"],
            "nothing can be drawn from a stream",
        ),
        (
            ["--streaming", "true", "--train_iters", "5", "--truncated_vocab_size", "9"],
            "--truncated_vocab_size: has to see all rows",
        ),
        (["--model_name", "a", "b", "c"], "takes one value, or one for Chinese rows"),
    ],
)
def test_what_does_not_go_together_is_refused(given: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        validate(parse_arguments(["--dataset", "a.jsonl", *given]), 1)


def test_batches_made_ahead_are_the_same_and_an_error_comes_in_its_turn() -> None:
    def numbers() -> Iterator[int]:
        yield from range(5)
        raise DataError("rows.jsonl:6: bad")

    found = ahead(numbers(), 3)
    assert list(islice(found, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="bad"):
        next(found)
    assert not [t for t in threading.enumerate() if t.name.startswith("jupiter-ahead")]
