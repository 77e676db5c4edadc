"""How the tokens of one step came, for people: the draft tree in text."""

from __future__ import annotations

from collections.abc import Sequence

from engine.pipeline.batch import Entry, Judge, Result
from engine.protocol import StepTrace
from engine.text import TextCodec


def step_trace(codec: TextCodec, entry: Entry, result: Result, pieces: Sequence[str]) -> StepTrace:
    """The trace of a judged entry whose tokens added `pieces` to the answer."""
    next_text = codec.token_text(result.next_token)
    if entry.judge is not Judge.TREE:
        return StepTrace(next_text=next_text, pieces=tuple(pieces))
    return StepTrace(
        texts=tuple(codec.token_text(token) for token in entry.tokens),
        parents=tuple(entry.parents),
        path=tuple(result.path),
        next_text=next_text,
        pieces=tuple(pieces),
    )
