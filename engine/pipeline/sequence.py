"""One request on its way through the scheduler: its tokens, its limits, its figures."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.decoding.accept import AcceptRule
from engine.decoding.drafted import Drafted
from engine.decoding.tree import ROOT_ONLY, Tree
from engine.pipeline.slots import Slot
from engine.protocol import Finished, FinishReason, Generate, Metrics, Started, Transcript
from engine.text import TextStream


class Fork(Generate, frozen=True, kw_only=True):
    """A request of the engine's own: it may begin with KV rows of any sequence, copied."""

    point: int = 0
    """The point of an outline that it writes, from 1; 0 for none."""


@dataclass
class Limits:
    """What may end an answer besides a stop token or stop string."""

    max_tokens: int | None
    max_steps: int | None
    context_length: int


@dataclass
class Sequence:
    """The state of one running request; only rank 0 holds it."""

    request_id: str
    tokens: list[int]
    """Prompt and accepted answer; the last accepted token's KV row is not there yet."""
    prompt_tokens: int
    begun: int
    """Tokens that were there at the beginning, all of which are prefilled: the prompt, and what
    the answer had already; see `recall`."""
    cached_tokens: int
    slot: Slot
    prompt_text: str
    rule: AcceptRule
    limits: Limits
    stream: TextStream
    arrived: float
    stop_ids: frozenset[int]
    fed: int
    """KV rows that were sent and count, once `keep` is carried out."""
    chunks: list[int]
    """Rows that are still to be prefilled, as they go into one micro-batch each."""
    point: int = 0
    """The point of an outline answer that it writes, from 1; 0 for none."""
    steps_before: int = 0
    """Decode steps that the answer took elsewhere."""
    transcript_wanted: bool = False
    keep: list[int] = field(default_factory=list)
    keep_to: int = 0
    drafted: Drafted = field(default_factory=Drafted)
    tree: Tree = ROOT_ONLY
    """Of the decode step that is under way, or was last."""
    trace: bool = False
    """How each token came is sent along."""
    in_flight: bool = False
    """A decode step is under way."""
    finish_reason: FinishReason | None = None
    context_full: bool = False
    first_token_at: float | None = None
    last_token_at: float | None = None
    decode_steps: int = 0
    decode_tokens: int = 0
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def answer(self) -> list[int]:
        """Accepted answer tokens."""
        return self.tokens[self.prompt_tokens :]

    @property
    def prefilling(self) -> bool:
        """Prompt rows are still to be sent, or their result has not come."""
        return self.first_token_at is None

    @property
    def ready_to_decode(self) -> bool:
        """The next tree can be sent."""
        return not (self.prefilling or self.in_flight or self.finish_reason)

    def sent(self, rows: int) -> None:
        """Rows of the next chunk are on their way, all of them or the first."""
        self.fed += rows
        self.chunks[0] -= rows
        if not self.chunks[0]:
            del self.chunks[0]

    def recall(self, answered: Iterable[int]) -> None:
        """Begin behind tokens of the answer that were shown before; they may end it at once."""
        for token in answered:
            self.tokens.append(token)
            if token in self.stop_ids or self.stream.push(token).stopped:
                self.finish_reason = "stop"
                break
        else:
            if self._limit_reached():
                self.finish_reason = "length"
        self.begun = len(self.tokens)

    def take(self, tokens: list[int]) -> tuple[list[int], list[str]]:
        """Add accepted tokens until one ends the answer.

        Returns the tokens that count and the text that each adds; sets `finish_reason` at an end.
        """
        now = time.perf_counter()
        if self.first_token_at is None:
            self.first_token_at = now
        self.last_token_at = now
        taken: list[int] = []
        pieces: list[str] = []
        for token in tokens:
            taken.append(token)
            pieces.append("")
            self.tokens.append(token)
            if token in self.stop_ids:
                self.finish_reason = "stop"
                break
            piece = self.stream.push(token)
            pieces[-1] = piece.text
            if piece.stopped:
                self.finish_reason = "stop"
                break
            if self._limit_reached():
                self.finish_reason = "length"
                break
        steps = self.limits.max_steps
        if (
            self.finish_reason is None
            and steps is not None
            and self.steps_before + self.decode_steps >= steps
        ):
            self.finish_reason = "length"
        if self.finish_reason is not None:
            pieces[-1] += self.stream.flush()
        return taken, pieces

    def count_step(self, path_length: int) -> None:
        """Book one decode step: which head depths were proposed and which accepted."""
        self.decode_steps += 1
        while len(self.proposed) < self.tree.depth:
            self.proposed.append(0)
            self.accepted.append(0)
        for depth in range(self.tree.depth):
            self.proposed[depth] += 1
            self.accepted[depth] += path_length > depth + 1

    def release(self) -> None:
        """Leave the slot, with what its rows hold for a prompt that goes on from here."""
        slot, tokens = self.slot, self.tokens
        if tokens[-1] in self.stop_ids:
            tokens = tokens[:-1]
        slot.tokens, slot.rows = tokens, min(self.fed, len(tokens))
        slot.keep, slot.keep_to = self.keep, self.keep_to
        exact = self.stream.is_text_of(tokens[self.prompt_tokens :])
        slot.text = self.prompt_text + self.stream.text if exact else ""
        slot.free()

    def started(self) -> Started:
        """The opening event."""
        prompt = self.tokens[: self.prompt_tokens]
        wanted = self.transcript_wanted
        return Started(
            request_id=self.request_id,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            transcript=Transcript(self.prompt_text, tuple(prompt)) if wanted else None,
        )

    def finished(self) -> Finished:
        """The closing event, once the slot is released."""
        assert self.finish_reason is not None
        slot, wanted = self.slot, self.transcript_wanted
        return Finished(
            request_id=self.request_id,
            finish_reason=self.finish_reason,
            context_full=self.context_full,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=len(self.answer),
            metrics=self._metrics(),
            transcript=Transcript(slot.text, tuple(slot.tokens)) if wanted else None,
        )

    def _limit_reached(self) -> bool:
        limits = self.limits
        self.context_full = len(self.tokens) >= limits.context_length
        most = limits.max_tokens
        return self.context_full or (most is not None and len(self.answer) >= most)

    def _metrics(self) -> Metrics:
        first, last = self.first_token_at, self.last_token_at
        decoding = last - first if first is not None and last is not None else 0.0
        return Metrics(
            ttft_s=None if first is None else first - self.arrived,
            tokens_per_s=self.decode_tokens / decoding if decoding > 0 else None,
            decode_steps=self.decode_steps,
            mean_accepted_len=self.decode_tokens / self.decode_steps if self.decode_steps else None,
            proposed_per_head=tuple(self.proposed),
            accepted_per_head=tuple(self.accepted),
        )


def never_started(request_id: str) -> Finished:
    """The closing event of a request that was cancelled while it waited."""
    return Finished(
        request_id=request_id,
        finish_reason="cancelled",
        context_full=False,
        prompt_tokens=0,
        cached_tokens=0,
        completion_tokens=0,
        metrics=Metrics(),
    )
