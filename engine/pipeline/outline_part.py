"""A sequence that writes some of an outline answer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from enum import Enum

from engine.protocol import Tokens, Transcript
from engine.text import TextCodec, TextStream


class Kind(Enum):
    """What a part writes."""

    OPENING = "opening"
    """The answer as ever, until it becomes a list."""
    LINES = "lines"
    """The outline, or some lines of it."""
    POINT = "point"
    """What belongs to one point."""
    PLAIN = "plain"
    """The rest of an answer that is no list after all."""


class Part:
    """One sequence's tokens, and where the text of each ends.

    Args:
        kind: what it writes.
        point: of the outline, from 1; 0 for none.
        before: what it goes on behind, as far as that is known.
        codec: the tokenizer.
    """

    def __init__(self, kind: Kind, point: int, before: Transcript, codec: TextCodec) -> None:
        self.kind, self.point, self.before = kind, point, before
        self.text = ""
        self.cut = False
        """It is being ended: what it writes on does not count."""
        self._tokens: list[int] = []
        self._ends: list[int] = []
        self._codec = codec
        self._stream = TextStream(codec, before.token_ids, ())
        self._shown = self._sent = 0

    def begin(self, before: Transcript, answered: Sequence[int]) -> None:
        """Take in the prompt, and what the client has of the answer already."""
        self.before = before
        self._stream = TextStream(self._codec, before.token_ids, ())
        self._push(answered)
        self.text = self._stream.text
        self.unsent(len(self.text))

    def add(self, event: Tokens) -> None:
        """Take in what was written."""
        self.text += event.text
        self._push(event.token_ids)

    def _push(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._tokens.append(token)
            self._stream.push(token)
            self._ends.append(len(self._stream.text))

    def tokens_of(self, length: int) -> int:
        """How many tokens lie within the first `length` characters."""
        return bisect_right(self._ends, length)

    def unsent(self, length: int) -> tuple[Sequence[int], str]:
        """What the client has not been sent yet of the first `length` characters."""
        upto = len(self._tokens) if length == len(self.text) else self.tokens_of(length)
        tokens, text = self._tokens[self._sent : upto], self.text[self._shown : length]
        self._sent, self._shown = max(self._sent, upto), max(self._shown, length)
        return tokens, text

    def up_to(self, length: int) -> Transcript:
        """What is before it, with its first `length` characters."""
        whole = self.tokens_of(length)
        tokens = [t for t in self._tokens[:whole] if t not in self._codec.stop_ids]
        at = min(self._ends[whole - 1] if whole else 0, length)
        done = Transcript(self.before.text + self.text[:at], (*self.before.token_ids, *tokens))
        return gone_on(done, self.text[at:length], self._codec)


def gone_on(before: Transcript, text: str, codec: TextCodec) -> Transcript:
    """A transcript with `text` behind it, encoded on its own."""
    if not text:
        return before
    added = codec.encode(text, add_special_tokens=False)
    return Transcript(before.text + text, (*before.token_ids, *added))
