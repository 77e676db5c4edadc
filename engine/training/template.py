"""Rows to tokens, with the tokens that are to be learnt: the model's own answers and their ends.

The chat template is rendered up to each answer, and with it; the answer is what lies between. The
whole text is tokenized at once, as a chat would see it, and offsets tell which tokens count.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

CHUNK = 1000


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


def tokenize(
    rows: Sequence[Row],
    codec: TextCodec,
    *,
    system: str | None = None,
    max_length: int | None = None,
    threads: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> list[Sample]:
    """The samples of `rows`, in their order.

    Args:
        system: system message of the rows that have none.
        max_length: a longer row is cut there; one that has no target left is dropped.
        threads: how many tokenize; None for one a core.
        note: told how many rows were cut or dropped.

    Raises:
        DataError: a row that the chat template refuses, or that has no answer.
    """
    limit = max_length or max(1, 2**31)
    samples: list[Sample] = []
    cut = dropped = 0
    with _threads(threads):
        for start in range(0, len(rows), CHUNK):
            rendered = [render(with_system(row, system), codec) for row in rows[start:][:CHUNK]]
            for text, encoding in zip(rendered, _encode(rendered, codec), strict=True):
                sample = _sample(text, encoding, codec)
                cut += len(sample) > limit
                sample = Sample(sample.tokens[:limit], sample.targets[:limit])
                if sample.targets[1:].any():
                    samples.append(sample)
                else:
                    dropped += 1
    if cut:
        note(f"{cut} of {len(rows)} rows are longer than max_length {max_length} and were cut")
    if dropped:
        note(f"{dropped} of {len(rows)} rows have nothing left to learn and were dropped")
    return samples


def render(row: Row, codec: TextCodec) -> Rendered:
    """The row's text through the chat template; a text of its own gets the eos token.

    Messages after the last answer are left out.

    Raises DataError.
    """
    if row.text is not None:
        text = row.text + codec.special.get("eos_token", "")
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


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Have the tokenizer use so many threads; it reads their number when it first needs them."""
    if count is None:
        yield
        return
    names = {"RAYON_NUM_THREADS": str(count), "TOKENIZERS_PARALLELISM": str(count > 1).lower()}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
