"""What answers of a live engine take: the planner's figures beside those that people see."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.protocol import Failed, Finished, Message, SamplingParams

if TYPE_CHECKING:
    from engine.client import EngineClient

ANSWER_TOKENS = 64


@dataclass
class Took:
    """What answers of one split took; those that were too short to tell are left out."""

    ttft_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    tokens_per_step: list[float] = field(default_factory=list)
    rows: int = 0
    """Prompt tokens that were computed."""
    nodes: int = 1
    """Of the draft tree."""

    @property
    def usual_step_s(self) -> float:
        """Of a decode step: the median over answers."""
        return statistics.median(self.step_s)

    @property
    def usual_ttft_s(self) -> float:
        """Time to the first token, likewise."""
        return statistics.median(self.ttft_s)

    def add(self, done: Finished) -> None:
        """One answer more."""
        metrics = done.metrics
        if metrics.ttft_s is None or not metrics.tokens_per_s or not metrics.mean_accepted_len:
            return
        self.ttft_s.append(metrics.ttft_s)
        self.step_s.append(metrics.mean_accepted_len / metrics.tokens_per_s)
        self.tokens_per_step.append(metrics.mean_accepted_len)
        self.rows = done.prompt_tokens - done.cached_tokens


async def take_answers(client: EngineClient, questions: Sequence[str]) -> Took:
    """Ask a running engine, greedily, one after the other; the first answer is to warm up.

    Raises EngineError.
    """
    took = Took()
    ready = client.ready
    assert ready is not None
    for index, text in enumerate(questions):
        params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
        stream = client.submit(messages=[Message("user", text)], params=params)
        async for event in stream:
            if isinstance(event, Failed):
                raise EngineError(event.message)
            if isinstance(event, Finished) and index:
                took.add(event)
    took.nodes = client.tree.nodes if client.tree else ready.tree_size
    return took


def prompts_of(folder: Path, tokens: int, count: int) -> list[str]:
    """Questions whose prompts have about so many tokens, each with another beginning."""
    from engine.bench.prompts import OWN
    from engine.checkpoint.tokenizer import ensure_tokenizer
    from engine.model.config import ModelConfig
    from engine.text import TextCodec

    codec = TextCodec(
        folder, ensure_tokenizer(folder), ModelConfig.from_folder(folder).eos_token_id
    )

    def size(text: str) -> int:
        prompt = codec.render([Message("user", text)])
        return len(codec.encode(prompt, add_special_tokens=False))

    found = []
    for turn in range(count):
        asked = [*OWN[turn % len(OWN) :], *OWN[: turn % len(OWN)]]
        words = " ".join([f"Question {turn}.", *asked]).split()
        words *= 1 + tokens // len(words)
        few, many = 0, len(words)
        while few < many:
            middle = (few + many) // 2
            if size(" ".join(words[:middle])) < tokens:
                few = middle + 1
            else:
                many = middle
        found.append(" ".join(words[:few]))
    return found
