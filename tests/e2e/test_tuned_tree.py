"""The tuned tree over live stages: measured before the first request, told, and without effect."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from engine.checkpoint.heads import write_heads
from engine.client import EngineClient
from engine.config import JupiterConfig, parse_config
from engine.protocol import (
    EventEnvelope,
    Finished,
    SamplingParams,
    StageTelemetry,
    Tokens,
    TreeChosen,
)
from engine.updates import Update
from tests.tiny import tiny_folder

DEADLINE_S = 60.0
PROMPT = "word word number 4?"


def config(heads: Path | None) -> JupiterConfig:
    values = {
        "base_model_name_or_path": str(tiny_folder()),
        "medusa_head_path": None if heads is None else str(heads),
        "stage_num_hidden_layers_list": [2, 4],
        "device": "cpu",
        "num_threads": 1,
    }
    return parse_config(values, "test")


@pytest.fixture
def heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Heads that repeat the next token's guesses."""
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "state"))
    tensors = {}
    for head in range(3):
        tensors[f"medusa_head.{head}.0.linear.weight"] = torch.zeros(32, 32)
        tensors[f"medusa_head.{head}.0.linear.bias"] = torch.zeros(32)
    write_heads(tmp_path / "heads", tensors, layout="v2")
    return tmp_path / "heads"


async def answer(client: EngineClient) -> tuple[list[int], Finished]:
    tokens: list[int] = []
    params = SamplingParams(temperature=0, max_tokens=80)
    async for event in client.submit(prompt=PROMPT, params=params):
        if isinstance(event, Tokens):
            tokens += event.token_ids
        elif isinstance(event, Finished):
            return tokens, event
    raise AssertionError("no end")


async def test_a_tuned_engine_tells_its_tree_and_answers_as_without_heads(heads: Path) -> None:
    updates: asyncio.Queue[Update] = asyncio.Queue()
    answers = []
    for path in (None, heads):
        client = EngineClient(config(path), listener=updates.put_nowait)
        try:
            ready = await client.start()
            answers.append(await answer(client))
        finally:
            await client.stop()
    assert answers[0][0] == answers[1][0]
    assert ready.tree_tuned
    seen = [u.body for u in updates._queue if isinstance(u, EventEnvelope)]  # type: ignore[attr-defined]
    chosen = [body for body in seen if isinstance(body, TreeChosen)]
    assert client.tree == chosen[-1]
    assert chosen[0].nodes == ready.tree_size
    for choice in chosen:
        assert choice.nodes in [option.nodes for option in choice.options]
        assert all(option.step_ms > 0 for option in choice.options)
    # The steps by which costs were measured are none of the run's.
    steps = [body.decode_steps for body in seen if isinstance(body, StageTelemetry)]
    assert max(steps) <= max(done.metrics.decode_steps for _, done in answers)
