"""Text streams: characters in pieces, stop strings, templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.errors import PromptError
from engine.protocol import Message
from engine.text import TextCodec, TextStream
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    folder = tiny_folder()
    return TextCodec(folder, folder / "tokenizer.json", ())


@pytest.fixture
def bytes_codec(tmp_path: Path) -> TextCodec:
    """A byte-level tokenizer: one character may take several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return TextCodec(tmp_path, tmp_path / "tokenizer.json", ())


def pieces(codec: TextCodec, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(codec, [], stop)
    shown = []
    for token in codec.encode(text, add_special_tokens=False):
        piece = stream.push(token)
        shown.append(piece.text)
        if piece.stopped:
            return shown, stream
    return [*shown, stream.flush()], stream


def test_a_character_of_several_tokens_appears_whole(bytes_codec: TextCodec) -> None:
    shown, stream = pieces(bytes_codec, "a🐱b")
    assert "".join(shown) == stream.text == "a🐱b"
    assert shown[:6] == ["a", "", "", "", "🐱", "b"]


def test_half_a_character_is_not_shown_and_not_called_exact(bytes_codec: TextCodec) -> None:
    tokens = bytes_codec.encode("a🐱", add_special_tokens=False)
    stream = TextStream(bytes_codec, [], ())
    assert "".join(stream.push(token).text for token in tokens[:3]) == "a"
    assert not stream.is_text_of(tokens[:3])
    assert stream.push(tokens[3]).text == ""
    assert stream.push(tokens[4]).text == "🐱"
    assert stream.is_text_of(tokens)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ("END",), "one "),
        ("one ENd two", ("END",), "one ENd two"),
        ("abab abc", ("abc", "zz"), "abab "),
        ("xyx", ("yx", "xyx"), ""),
        ("tail EN", ("END",), "tail EN"),
    ],
)
def test_a_stop_string_is_never_shown_in_part(
    codec: TextCodec, text: str, stop: tuple[str, ...], expected: str
) -> None:
    shown, stream = pieces(codec, text, stop)
    assert "".join(shown) == stream.text == expected


def test_text_that_cannot_become_a_stop_string_is_not_held_back(codec: TextCodec) -> None:
    assert pieces(codec, "ab", ("xyz",))[0] == ["a", "b", ""]


def test_the_turn_end_of_the_template_stops_an_answer(codec: TextCodec) -> None:
    assert codec.tokenizer.token_to_id("<|im_end|>") in codec.stop_ids


def test_generation_config_and_template_both_give_stop_tokens(tmp_path: Path) -> None:
    source = tiny_folder()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    codec = TextCodec(tmp_path, tmp_path / "tokenizer.json", (9,))
    assert codec.stop_ids == {7, 8, 9, codec.tokenizer.token_to_id("<|im_end|>")}


def test_a_model_without_a_template_chats_in_vicunas_form(bytes_codec: TextCodec) -> None:
    assert not bytes_codec.has_chat_template
    text = bytes_codec.render([Message("user", "hi"), Message("assistant", "yo")])
    assert " USER: hi ASSISTANT: yo" in text
    assert text.endswith(" ASSISTANT:")


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    source = tiny_folder()
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    codec = TextCodec(tmp_path, tmp_path / "tokenizer.json", ())
    with pytest.raises(PromptError, match="template refuses"):
        codec.render([Message("user", "hi")])
