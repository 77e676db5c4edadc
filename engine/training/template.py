"""Rows to tokens, with the tokens that are to be learnt: the model's own answers and their ends.

The chat template is rendered up to each answer, and with it; the answer is what lies between. The
whole text is tokenized at once, as a chat would see it, and offsets tell which tokens count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from engine.errors import PromptError
from engine.protocol import Message
from engine.text import TextCodec
from engine.training.row_files import DataError
from engine.training.rows import Row, with_system


@dataclass(frozen=True, eq=False)
class Sample:
    """One tokenized row."""

    tokens: npt.NDArray[np.int64]
    """[n] token ids."""
    targets: npt.NDArray[np.bool_]
    """[n]: True where the token is to be predicted: answers with their end of turn."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Rendered:
    """A row as text, and where in it the answers are, as character ranges."""

    text: str
    answers: tuple[tuple[int, int], ...]
    cut: bool
    is_chat: bool


@dataclass(frozen=True)
class Form:
    """How rows become samples."""

    system: str | None = None
    """System message of the rows that have none."""
    max_length: int | None = None
    """A longer row is cut there; one that has no target left is dropped."""
    whole: bool = False
    """Every token is learnt, without a chat template: continued pretraining."""


@dataclass
class Tokenized:
    """Samples in the order of their rows, and what became of the others."""

    samples: list[Sample]
    cut: int = 0
    dropped: int = 0


def tokenize_chunk(rows: Sequence[Row], codec: TextCodec, form: Form) -> Tokenized:
    """The samples of some rows.

    Raises:
        DataError: a row that the chat template refuses, or that has no answer.
    """
    limit = form.max_length or max(1, 2**31)
    done = Tokenized([])
    rendered = [render(with_system(row, form.system), codec, whole=form.whole) for row in rows]
    for text, encoding in zip(rendered, _encode(rendered, codec), strict=True):
        sample = _sample(text, encoding, codec)
        done.cut += len(sample) > limit
        sample = Sample(sample.tokens[:limit], sample.targets[:limit])
        if sample.targets[1:].any():
            done.samples.append(sample)
        else:
            done.dropped += 1
    return done


def render(row: Row, codec: TextCodec, *, whole: bool = False) -> Rendered:
    """The row's text through the chat template; a text of its own gets the eos token.

    Messages after the last answer are left out. With `whole` a conversation is a text, too: its
    messages under one another.

    Raises DataError.
    """
    text = row.text
    if text is None and whole:
        text = "\n".join(message.content for message in row.messages)
    if text is not None:
        text += codec.special.get("eos_token", "")
        return Rendered(text, ((0, len(text)),), cut=False, is_chat=False)
    turns = [at for at, message in enumerate(row.messages) if message.role == "assistant"]
    if not turns:
        raise DataError(f"{row.where}: has no assistant message to learn from")
    try:
        spans = [_answer(row.messages[: at + 1], codec) for at in turns]
    except PromptError as error:
        raise DataError(f"{row.where}: {error}") from None
    text = spans[-1][0]
    answers = []
    for at, (until, start) in zip(turns, spans, strict=True):
        end = _common(text, until)
        if row.messages[at].content.strip() not in text[start:end]:
            raise DataError(
                f"{row.where}: the chat template rewrites earlier turns; give single turns"
            )
        answers.append((start, end))
    return Rendered(text, tuple(answers), row.cut, is_chat=True)


def _common(text: str, until: str) -> int:
    """How many characters both begin with: all of `until`, as a rule.

    Some templates end every text with the beginning of the next answer.
    """
    if text.startswith(until):
        return len(until)
    pairs = enumerate(zip(text, until, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(text), len(until)))


def _answer(messages: Sequence[Message], codec: TextCodec) -> tuple[str, int]:
    """The text of a conversation that ends with an answer, and where the answer begins."""
    asked = codec.render(messages[:-1])
    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        text: str = codec.template.render(
            messages=turns, add_generation_prompt=False, tools=None, **codec.special
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise PromptError(f"the model's chat template refuses these messages: {error}") from None
    if not text.startswith(asked):
        raise PromptError("the chat template writes an answer after another text than its prompt")
    return text, len(asked)


def _encode(rendered: Sequence[Rendered], codec: TextCodec) -> list[Encoding]:
    """Encodings in order; only a text of its own gets the tokenizer's special tokens."""
    found: dict[int, Encoding] = {}
    for is_chat in (True, False):
        chosen = [at for at, row in enumerate(rendered) if row.is_chat is is_chat]
        encodings = codec.tokenizer.encode_batch(
            [rendered[at].text for at in chosen], add_special_tokens=not is_chat
        )
        found.update(zip(chosen, encodings, strict=True))
    return [found[at] for at in range(len(rendered))]


def _sample(rendered: Rendered, encoding: Encoding, codec: TextCodec) -> Sample:
    """Targets are the tokens of each answer up to its end-of-turn token, which is the last."""
    tokens = np.array(encoding.ids, dtype=np.int64)
    if not rendered.is_chat:
        return Sample(tokens, np.ones(len(tokens), dtype=bool))
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    targets = np.zeros(len(tokens), dtype=bool)
    is_stop = np.isin(tokens, list(codec.stop_ids))
    last = 0
    for answer in rendered.answers:
        inside = _inside(offsets, answer)
        stops = inside[is_stop[inside]]
        # Text after the end of a turn belongs to the template; the model never writes it.
        end = stops[-1] + 1 if len(stops) else inside[-1] + 1 if len(inside) else 0
        if rendered.cut and answer is rendered.answers[-1]:
            end = stops[-1] if len(stops) else end
        targets[inside[inside < end]] = True
        last = int(end)
    return Sample(tokens[:last], targets[:last])


def _inside(offsets: npt.NDArray[np.int64], span: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Numbers of the tokens that lie in a range of characters, in their order."""
    start, end = span
    return np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 1] <= end))
