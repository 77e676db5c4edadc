"""One request on its way through the scheduler: its tokens, its limits, its figures."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from engine.decoding.accept import AcceptRule
from engine.decoding.tree import Tree
from engine.pipeline.slots import Slot
from engine.protocol import Finished, FinishReason, Metrics
from engine.text import TextStream


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
    chunk: int
    """Rows of the prompt that go into one micro-batch."""
    keep: list[int] = field(default_factory=list)
    keep_to: int = 0
    candidates: list[list[int]] = field(default_factory=list)
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

    def take(self, tokens: list[int]) -> tuple[list[int], str]:
        """Add accepted tokens until one ends the answer.

        Returns the tokens that count and the text they add; sets `finish_reason` at an end.
        """
        now = time.perf_counter()
        if self.first_token_at is None:
            self.first_token_at = now
        self.last_token_at = now
        taken: list[int] = []
        text = ""
        for token in tokens:
            taken.append(token)
            self.tokens.append(token)
            if token in self.stop_ids:
                self.finish_reason = "stop"
                break
            piece = self.stream.push(token)
            text += piece.text
            if piece.stopped:
                self.finish_reason = "stop"
                break
            if self._limit_reached():
                self.finish_reason = "length"
                break
        steps = self.limits.max_steps
        if self.finish_reason is None and steps is not None and self.decode_steps >= steps:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self.stream.flush()
        return taken, text

    def count_step(self, tree: Tree, path_length: int) -> None:
        """Book one decode step: which head depths were proposed and which accepted."""
        self.decode_steps += 1
        while len(self.proposed) < tree.depth:
            self.proposed.append(0)
            self.accepted.append(0)
        for depth in range(tree.depth):
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
        slot.busy = False

    def finished(self) -> Finished:
        """The closing event."""
        assert self.finish_reason is not None
        return Finished(
            request_id=self.request_id,
            finish_reason=self.finish_reason,
            context_full=self.context_full,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=len(self.answer),
            metrics=self._metrics(),
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
