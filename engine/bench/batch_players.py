"""Who answers in the batch bench: our engine at some width, transformers' padded batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.bench.peer import Ask
from engine.bench.players import PeerProcess, Question
from engine.client import EngineClient
from engine.config import JupiterConfig
from engine.errors import EngineError
from engine.protocol import Failed, Finished, SamplingParams, Tokens


@dataclass(frozen=True)
class BatchRun:
    """Some answers, and what they took from the first question to the last answer's end."""

    answers: list[tuple[int, ...]]
    seconds: float

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(map(len, self.answers))


class BatchPlayer(Protocol):
    """An engine in the bench."""

    name: str
    part: int
    """Questions that it is given at a time."""

    async def start(self) -> None:
        """Load the model; raises a JupiterError."""

    async def answer(self, questions: Sequence[Question], limits: Sequence[int]) -> BatchRun:
        """Answer all greedily, each with so many tokens at most; raises a JupiterError."""

    async def stop(self) -> None:
        """Leave no process; idempotent."""


class OurBatch:
    """Jupiter through its client: all questions are asked at once, the engine chooses its pace."""

    def __init__(self, name: str, config: JupiterConfig, part: int) -> None:
        self.name, self.part = name, part
        self._client = EngineClient(config)

    async def start(self) -> None:
        """Start the workers."""
        await self._client.start()

    async def answer(self, questions: Sequence[Question], limits: Sequence[int]) -> BatchRun:
        """See BatchPlayer."""
        began = time.perf_counter()
        answers = await asyncio.gather(
            *(self._one(q, limit) for q, limit in zip(questions, limits, strict=True))
        )
        return BatchRun(list(answers), time.perf_counter() - began)

    async def _one(self, question: Question, limit: int) -> tuple[int, ...]:
        tokens: list[int] = []
        params = SamplingParams(max_tokens=limit, temperature=0)
        async for event in self._client.submit(messages=question.chat, params=params):
            match event:
                case Tokens():
                    tokens += event.token_ids
                case Finished():
                    return tuple(tokens)
                case Failed():
                    raise EngineError(event.message)
        raise EngineError(f"{self.name}: an answer never ended")

    async def stop(self) -> None:
        """Stop the workers."""
        await self._client.stop()


class PaddedBatch:
    """transformers' `generate`, so many prompts in one call."""

    def __init__(
        self, name: str, process: PeerProcess, stop_ids: Sequence[int], width: int
    ) -> None:
        self.name, self.part = name, width
        self._process, self._stop = process, tuple(stop_ids)

    async def start(self) -> None:
        """Start its process."""
        await self._process.start()

    async def answer(self, questions: Sequence[Question], limits: Sequence[int]) -> BatchRun:
        """Times are those of the process itself: no pipe is in them."""
        prompts = tuple(question.tokens for question in questions)
        ask = Ask(stop=self._stop, mode="batch", batch=prompts, limits=tuple(limits))
        reply = await self._process.ask(ask)
        return BatchRun(list(reply.batch), reply.arrivals[0])

    async def gap(self, tokens: Sequence[int]) -> float:
        """How far apart the model's two best logits are after some tokens."""
        reply = await self._process.ask(Ask(tuple(tokens), mode="gap"))
        return reply.arrivals[0]

    async def stop(self) -> None:
        """Stop its process."""
        await self._process.stop()
