"""The tuned tree over live stages: measured before the first request, told, and without effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoint.heads import write_heads
from engine.client import EngineClient
from engine.config import JupiterConfig, parse_config
from engine.protocol import (
    EngineReady,
    Event,
    EventEnvelope,
    Finished,
    SamplingParams,
    StageTelemetry,
    Tokens,
    TreeChosen,
)
from engine.updates import Update
from tests.tiny import tiny_folder

PROMPT = "word word number 4?"


def config(heads: Path | None, split: list[int]) -> JupiterConfig:
    values = {
        "base_model_name_or_path": str(tiny_folder()),
        "medusa_head_path": None if heads is None else str(heads),
        "stage_num_hidden_layers_list": split,
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


async def run(path: Path | None, split: list[int]) -> tuple[list[int], list[Event]]:
    """The tokens of an answer, and all that the workers have told."""
    updates: list[Update] = []
    client = EngineClient(config(path, split), listener=updates.append)
    try:
        ready = await client.start()
        tokens, done = await answer(client)
    finally:
        await client.stop()
    assert ready.tree_tuned == (path is not None)
    told = [update.body for update in updates if isinstance(update, EventEnvelope)]
    # The steps by which costs were measured are none of the run's.
    samples = [body for body in told if isinstance(body, StageTelemetry)]
    assert max(sample.decode_steps for sample in samples) <= done.metrics.decode_steps
    assert client.tree == next((b for b in reversed(told) if isinstance(b, TreeChosen)), None)
    return tokens, told


async def test_a_tuned_engine_tells_its_tree_and_answers_as_without_heads(heads: Path) -> None:
    plain, told = await run(None, [2, 4])
    assert not any(isinstance(body, TreeChosen) for body in told)
    for split in ([2, 4], [1, 2, 3]):
        tokens, told = await run(heads, split)
        assert tokens == plain
        (ready,) = [body for body in told if isinstance(body, EngineReady)]
        chosen = [body for body in told if isinstance(body, TreeChosen)]
        assert chosen[0].nodes == ready.tree_size
        for choice in chosen:
            assert choice.nodes in [option.nodes for option in choice.options]
            assert all(option.step_ms > 0 for option in choice.options)
