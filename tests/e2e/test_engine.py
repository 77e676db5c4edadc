"""Live stages on a tiny model: turns, cancelling, idling, heads, counters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.heads import write_heads
from engine.client import EngineClient, Update
from engine.config import parse_config
from engine.protocol import (
    EventEnvelope,
    Finished,
    Message,
    SamplingParams,
    StageTelemetry,
    Started,
    Tokens,
)
from tests.tiny import tiny_folder

GREEDY = SamplingParams(temperature=0, max_tokens=24)
ENDLESS = SamplingParams(temperature=0)


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "state"))


@asynccontextmanager
async def engine(
    split: list[int], listener: Callable[[Update], None] | None = None, **values: Any
) -> AsyncIterator[EngineClient]:
    config = parse_config(
        {
            "base_model_name_or_path": str(tiny_folder()),
            "stage_num_hidden_layers_list": split,
            "device": "cpu",
            "num_threads": 1,
            **values,
        },
        "test",
    )
    client = EngineClient(config, listener=listener)
    try:
        await client.start()
        yield client
    finally:
        await client.stop()


async def ask(client: EngineClient, *messages: Message, params: SamplingParams = GREEDY) -> Answer:
    answer = Answer()
    async for event in client.submit(messages=messages, params=params):
        answer.add(event)
    return answer


class Answer:
    """What came back of one request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.started: Started | None = None
        self.done: Finished | None = None

    def add(self, event: Any) -> None:
        match event:
            case Started():
                self.started = event
            case Tokens():
                self.tokens += event.token_ids
                self.text += event.text
            case Finished():
                self.done = event


def user(text: str) -> Message:
    return Message("user", text)


async def test_a_second_turn_runs_only_its_new_rows_on_every_stage() -> None:
    rows: dict[int, int] = {}
    heard = asyncio.Event()

    def watch(update: Update) -> None:
        if isinstance(update, EventEnvelope) and isinstance(update.body, StageTelemetry):
            rows[update.rank] = update.body.rows
            heard.set()

    async with engine([2, 2, 2], watch) as client:
        first = await ask(client, user("hello there"))
        turns = (user("hello there"), Message("assistant", first.text), user("and now?"))
        second = await ask(client, *turns)
        assert first.started and first.done and second.started and second.done
        new = second.started.prompt_tokens - second.started.cached_tokens
        assert new < second.started.prompt_tokens / 2
        steps = first.done.metrics.decode_steps + second.done.metrics.decode_steps
        expected = first.started.prompt_tokens + new + steps
        async with asyncio.timeout(20):
            while set(rows.values()) != {expected} or len(rows) < 3:
                heard.clear()
                await heard.wait()
    async with engine([6]) as client:
        assert (await ask(client, *turns)).tokens == second.tokens


async def test_cancel_keeps_the_partial_text_and_the_engine_goes_on() -> None:
    async with engine([3, 3]) as client:
        whole = await ask(client, user("count to ten"))
        stream = client.submit(messages=[user("count to ten")], params=ENDLESS)
        answer, after = Answer(), 0
        async for event in stream:
            answer.add(event)
            if isinstance(event, Tokens):
                if len(answer.tokens) == 5:
                    client.cancel(stream.request_id)
                after += len(answer.tokens) > 5
        assert answer.done is not None
        if answer.done.finish_reason == "cancelled":  # a short answer may end by itself
            assert after < 40
        assert answer.tokens[:24] == whole.tokens[: len(answer.tokens)]
        assert (await ask(client, user("count to ten"))).tokens == whole.tokens


async def test_a_chat_idles_longer_than_the_group_timeout_and_goes_on() -> None:
    timeout_s = 2.0
    samples = 0
    heard = asyncio.Event()

    def count(update: Update) -> None:
        nonlocal samples
        last = isinstance(update, EventEnvelope) and update.rank == 2
        samples += last and isinstance(update.body, StageTelemetry)
        heard.set()

    async with engine([2, 2, 2], count, distributed_timeout_minutes=timeout_s / 60) as client:
        before = await ask(client, user("hello"))
        loop = asyncio.get_running_loop()
        quiet, samples = loop.time(), 0
        async with asyncio.timeout(60):
            # The last stage is heard every half second: wait until three timeouts have passed.
            while loop.time() - quiet < 3 * timeout_s or samples < 6:
                heard.clear()
                await heard.wait()
        assert (await ask(client, user("hello"))).tokens == before.tokens


async def test_heads_cross_the_stages_and_change_no_token(tmp_path: Path) -> None:
    # ResBlocks of zeros repeat the next token's guesses: often right where text repeats itself.
    tensors = {}
    for head in range(3):
        tensors[f"medusa_head.{head}.0.linear.weight"] = torch.zeros(32, 32)
        tensors[f"medusa_head.{head}.0.linear.bias"] = torch.zeros(32)
    write_heads(tmp_path / "heads", tensors, layout="v2")
    questions = [user(f"{'word ' * n}number {n * n}") for n in range(8)]
    async with engine([3, 3]) as client:
        plain = await asyncio.gather(*(ask(client, question) for question in questions))
    heads = {"medusa_head_path": str(tmp_path / "heads"), "medusa_choices": "mc_63"}
    async with engine([1, 4, 1], max_num_seqs=3, **heads) as client:
        assert client.ready is not None
        assert client.ready.medusa_num_heads == 3
        drafted = await asyncio.gather(*(ask(client, question) for question in questions))
    assert [answer.tokens for answer in drafted] == [answer.tokens for answer in plain]
    metrics = [answer.done.metrics for answer in drafted if answer.done]
    assert sum(m.accepted_per_head[0] for m in metrics) > 0
    assert all(m.proposed_per_head == (m.decode_steps,) * 3 for m in metrics)


async def test_a_merged_model_brings_its_own_heads(tmp_path: Path) -> None:
    from engine.checkpoint.merge import merge

    tensors = {
        "medusa_head.0.0.linear.weight": torch.zeros(32, 32),
        "medusa_head.0.0.linear.bias": torch.zeros(32),
        "medusa_head.0.1.weight": torch.randn(260, 32),
    }
    write_heads(tmp_path / "heads", tensors, layout="fasterdecoding")
    merge(tiny_folder(), tmp_path / "heads", tmp_path / "merged", dtype=None)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["medusa_num_heads"] == 1
    merged = {"base_model_name_or_path": str(tmp_path / "merged")}
    async with engine([3, 3], **merged) as client:
        assert client.ready is not None
        assert client.ready.medusa_num_heads == 1
        answer = await ask(client, user("hello"))
    async with engine([6]) as client:
        assert (await ask(client, user("hello"))).tokens == answer.tokens
