"""Rows to tokens: what is learnt of a conversation is the answers and their ends, nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from engine.protocol import Message
from engine.text import TextCodec
from engine.training import tokenizing
from engine.training.args import TrainArguments
from engine.training.data import load_samples
from engine.training.row_files import DataError
from engine.training.rows import Row
from engine.training.template import Form, Sample
from engine.training.tokenizing import digest_of, stored, tokenize

Write = Callable[..., Path]
USER, ANSWER = Message("user", "ask"), Message("assistant", "say so")
END = "<|im_end|>"
# Leaves all answers but the last out.
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)


def row(*messages: Message, **more: Any) -> Row:
    return Row("data: line 1", "1", messages=messages, **more)


def learnt(codec: TextCodec, sample: Sample) -> list[str]:
    """The stretches of text that count in the loss."""
    found: list[list[int]] = []
    counted = False
    for token, counts in zip(sample.tokens.tolist(), sample.targets.tolist(), strict=True):
        if counts and not counted:
            found.append([])
        if counts:
            found[-1].append(token)
        counted = counts
    return [codec.tokenizer.decode(part, skip_special_tokens=False) for part in found]


def text_of(codec: TextCodec, sample: Sample) -> str:
    return codec.tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=False)


def test_an_answer_is_learnt_with_its_end_and_nothing_of_the_template(codec: TextCodec) -> None:
    (sample,) = tokenize([row(USER, ANSWER)], codec)
    assert learnt(codec, sample) == [f"say so{END}"]
    prompt = codec.encode(codec.render([USER]), add_special_tokens=False)
    assert sample.tokens[: len(prompt)].tolist() == prompt  # as the engine sees it
    assert not sample.targets[: len(prompt)].any()
    assert sample.targets[len(prompt) :].all()


def test_every_answer_of_a_conversation_is_learnt(codec: TextCodec) -> None:
    more = (Message("user", "and"), Message("assistant", "then"))
    (sample,) = tokenize([row(USER, ANSWER, *more)], codec)
    assert learnt(codec, sample) == [f"say so{END}", f"then{END}"]
    whole = codec.render([USER, ANSWER, more[0]]) + f"then{END}"
    assert text_of(codec, sample) == whole
    (same,) = tokenize([row(USER, ANSWER, *more, Message("user", "unanswered"))], codec)
    assert same.tokens.tolist() == sample.tokens.tolist()


def test_an_answer_that_was_cut_has_no_end_to_learn(codec: TextCodec) -> None:
    first = Message("assistant", "whole")
    (sample,) = tokenize([row(USER, first, USER, ANSWER, cut=True)], codec)
    assert learnt(codec, sample) == [f"whole{END}", "say so"]
    assert text_of(codec, sample).endswith("say so")


def test_an_answer_that_says_the_end_token_itself_ends_at_its_last(codec: TextCodec) -> None:
    (sample,) = tokenize([row(USER, Message("assistant", f"a{END}b"))], codec)
    assert learnt(codec, sample) == [f"a{END}b{END}"]


def test_the_system_message_of_the_run_goes_before_rows_that_have_none(codec: TextCodec) -> None:
    own = Message("system", "own")
    plain, kept = tokenize([row(USER, ANSWER), row(own, USER, ANSWER)], codec, Form(system="given"))
    assert text_of(codec, plain).startswith("<|im_start|>system\ngiven")
    assert text_of(codec, kept).startswith("<|im_start|>system\nown")


def test_a_text_is_learnt_whole_and_ends(codec: TextCodec) -> None:
    (sample,) = tokenize(
        [Row("data: line 1", "1", text="once")], codec, Form(system="not for texts")
    )
    assert text_of(codec, sample) == f"once{END}"
    assert sample.targets.all()


def test_long_rows_are_cut_and_those_with_nothing_left_are_dropped(codec: TextCodec) -> None:
    prompt = len(codec.encode(codec.render([USER]), add_special_tokens=False))
    told: list[str] = []
    rows = [row(USER, ANSWER), row(Message("user", "ask" * 9), ANSWER)]
    (sample,) = tokenize(rows, codec, Form(max_length=prompt + 3), note=told.append)
    assert learnt(codec, sample) == ["say"]
    assert told == [
        f"2 of 2 rows are longer than max_length {prompt + 3} and were cut",
        "1 of 2 rows have nothing left to learn and were dropped",
    ]


def test_order_and_tokens_are_the_same_with_any_number_of_processes(
    codec: TextCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(USER, Message("assistant", "a" * n)) for n in range(1, 30)]
    rows[3::5] = [Row("data: line 1", "1", text="bb" + "b" * n) for n in range(len(rows[3::5]))]
    runs = [tokenize(rows, codec, processes=processes) for processes in (None, 1, 2)]
    tokens = [[sample.tokens.tolist() for sample in run] for run in runs]
    assert tokens[0] == tokens[1] == tokens[2]
    monkeypatch.setattr(tokenizing, "CHUNK", 16)  # now the second process has something to do
    assert [s.tokens.tolist() for s in tokenize(rows, codec, processes=2)] == tokens[0]
    with pytest.raises(DataError, match="data: line 1: has no assistant message"):
        tokenize([*rows, row(USER)], codec, processes=2)
    assert len(tokens[0]) == len(rows)


def test_a_row_without_an_answer_is_named(codec: TextCodec) -> None:
    with pytest.raises(DataError, match="data: line 1: has no assistant message to learn from"):
        tokenize([row(USER)], codec)


@pytest.fixture
def vicuna(tmp_path: Path) -> TextCodec:
    """A tokenizer as Llama's: a space is a part of the word that follows it. No chat template."""
    words = ["<unk>", "▁ASSISTANT:", "▁USER:", "▁say", "▁so", "▁", "▁ask"]
    letters = sorted(set("".join(words)) | set(map(chr, range(33, 127))))
    vocab = {word: index for index, word in enumerate(dict.fromkeys([*letters, *words]))}
    pieces = ["▁s", "▁sa", "▁so", "▁say", "▁a", "▁as", "▁ask"]
    vocab |= {piece: len(vocab) + index for index, piece in enumerate(pieces)}
    merges = [(piece[:-1], piece[-1]) for piece in pieces]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return TextCodec(tmp_path, tmp_path / "tokenizer.json", [])


def test_words_that_carry_their_space_are_learnt_as_the_model_writes_them(
    vicuna: TextCodec,
) -> None:
    (sample,) = tokenize([row(USER, ANSWER, USER, ANSWER)], vicuna)
    assert learnt(vicuna, sample) == [" say so</s>", " say so</s>"]
    prompt = vicuna.encode(vicuna.render([USER]), add_special_tokens=False)
    assert sample.tokens[: len(prompt)].tolist() == prompt
    assert vicuna.tokenizer.id_to_token(int(sample.tokens[len(prompt)])) == "▁say"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('no system') }}", "the model's chat template refuses these messages"),
        ("{% if add_generation_prompt %}go{% else %}{{ messages[0].content }}{% endif %}",
         "the chat template writes an answer after another text than its prompt"),
        (FORGETFUL, "the chat template rewrites earlier turns"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_followed_is_told_with_the_row(
    codec: TextCodec, template: str, problem: str
) -> None:
    codec.template = codec.template.environment.from_string(template)
    with pytest.raises(DataError, match=f"data: line 1: .*{problem}"):
        tokenize([row(USER, ANSWER, USER, ANSWER)], codec)


def test_samples_are_loaded_by_the_arguments(codec: TextCodec, jsonl: Write) -> None:
    data = jsonl(*({"query": f"q{n}", "response": f"r{n}"} for n in range(20)))
    own = jsonl({"query": "x", "response": "y"}, name="val.jsonl")
    args = TrainArguments(dataset=[str(data)], split_dataset_ratio=0.25)
    train, held = (load_samples(args, codec, split) for split in ("train", "eval"))
    assert (len(train), len(held)) == (15, 5)
    found = sorted(learnt(codec, sample)[0] for sample in [*train, *held])
    assert found == sorted(f"r{n}{END}" for n in range(20))
    args = TrainArguments(dataset=[str(data)], val_dataset=[str(own)])
    assert len(load_samples(args, codec, "train")) == 20
    assert [learnt(codec, s) for s in load_samples(args, codec, "eval")] == [[f"y{END}"]]
    with pytest.raises(DataError, match="holds nothing to learn"):
        load_samples(TrainArguments(dataset=[str(data)], max_length=3), codec, "train")


def test_tokens_are_kept_on_the_disk_by_content_and_tokenizer(
    codec: TextCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(USER, Message("assistant", "a" * n)) for n in range(1, 9)]
    told: list[list[str]] = [[], []]
    form = Form(max_length=40)
    first = stored(rows, codec, form, note=told[0].append)
    monkeypatch.setattr(tokenizing, "tokenize_chunk", None)  # from here on nothing may tokenize
    again = stored(rows, codec, form, note=told[1].append)
    assert told[0] == told[1] and "8 rows" not in told[0]
    assert again.digest == first.digest and again.lengths.tolist() == first.lengths.tolist()
    for before, after in zip(first, again, strict=True):
        assert after.tokens.dtype == np.int64
        assert after.tokens.tolist() == before.tokens.tolist()
        assert after.targets.tolist() == before.targets.tolist()
    monkeypatch.undo()
    others = [digest_of(rows[1:], codec, form), digest_of(rows, codec, Form(max_length=39))]
    codec.tokenizer.add_tokens(["new"])
    others.append(digest_of(rows, codec, form))
    assert len({first.digest, *others}) == 4


def test_only_the_newest_token_files_are_kept_and_none_is_no_error(
    codec: TextCodec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tokenizing, "KEPT", 2)
    for n in range(4):
        assert len(stored([row(USER, Message("assistant", "a" * (n + 1)))], codec, Form())) == 1
    assert len(list((tmp_path / "cache" / "tokens").glob("[0-9a-f]*"))) == 2
    monkeypatch.setattr(tokenizing, "cache_dir", lambda: tmp_path / "model" / "tokenizer.json")
    assert len(stored([row(USER, ANSWER)], codec, Form())) == 1


def test_a_model_learns_its_own_names(codec: TextCodec, jsonl: Write) -> None:
    says = "{{NAME}} by {{AUTHOR}}"
    data = jsonl(
        {"query": "who", "response": says, "tag": "en"},
        {"query": "shei", "response": says, "tag": "zh"},
        {"query": "who", "response": says},
    )
    told: list[str] = []

    def learns(**given: list[str]) -> list[str]:
        args = TrainArguments(dataset=[str(data)], split_dataset_ratio=0.0, **given)
        return [learnt(codec, s)[0] for s in load_samples(args, codec, "train", note=told.append)]

    pairs = learns(model_name=["Xiao", "Small"], model_author=["Ta", "Her"])
    assert pairs == [f"Small by Her{END}", f"Xiao by Ta{END}", f"Small by Her{END}"]
    assert told == []
    assert learns(model_name=["One"]) == [f"One by {{{{AUTHOR}}}}{END}"] * 3
    assert told == ["3 rows say {{AUTHOR}}, which stays as it is: --model_author is not given"]
