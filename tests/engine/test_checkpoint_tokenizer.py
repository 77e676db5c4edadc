"""Checkpoints that have only a sentencepiece model get a tokenizer.json, made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer

from engine.checkpoint.convert import convert_tokenizer
from engine.checkpoint.tokenizer import ensure_tokenizer
from engine.errors import CheckpointError
from tests.tiny import tiny_folder

# None begins with a space: before one, transformers leaves out the space sentencepiece adds.
TEXTS = ["hello world", "two  spaces ", "é 世 12\n\ttab", "The lazy fox's test"]
BOS = 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama folder as Vicuna's: tokenizer.model and tokenizer_config.json, no tokenizer.json."""
    monkeypatch.setenv("JUPITER_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "vicuna"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world this is a test", "the quick lazy fox"] * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}
    settings |= tokens
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_it_gives_the_ids_of_sentencepiece_and_is_made_once(folder: Path) -> None:
    lines: list[str] = []
    path = ensure_tokenizer(folder, lines.append)
    assert not folder.samefile(path.parent) and lines
    made = Tokenizer.from_file(str(path))
    original = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    for text in TEXTS:
        assert made.encode(text).ids == [BOS, *original.encode(text)]
        assert made.encode(text, add_special_tokens=False).ids == original.encode(text)
    lines.clear()
    assert ensure_tokenizer(folder, lines.append) == path and not lines


def test_a_tokenizer_json_is_taken_as_it_is() -> None:
    assert ensure_tokenizer(tiny_folder()) == tiny_folder() / "tokenizer.json"


def test_a_damaged_or_missing_one_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"not sentencepiece")
    with pytest.raises(CheckpointError, match=r"vicuna: its tokenizer cannot be read"):
        convert_tokenizer(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"no tokenizer; expected tokenizer\.json"):
        ensure_tokenizer(tmp_path)
