"""`jupiter bench soak`: hundreds of requests of every kind through the stages, and what they leave.

Random prompts, lengths and ways of sampling, many at a time, some of them cancelled. Then every
greedy and every seeded nucleus answer is compared with that of the same request asked alone of one
stage without heads, and the stages' memory with what it was when every place had been used once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import psutil

from engine.bench.batch_work import prompts
from engine.bench.command import positive, run_to_end, say
from engine.bench.machine import machine
from engine.bench.prefill import even_split
from engine.bench.prompts import Chat
from engine.cli.options import add_config_options, config_of, model_folder
from engine.client import EngineClient
from engine.config import JupiterConfig
from engine.errors import ConfigError, EngineError, ExitCode
from engine.launch import usable_cores
from engine.model.config import ModelConfig
from engine.protocol import Failed, Finished, Message, SamplingParams, Tokens

REQUESTS = 500
WORLD = 3
OPEN = 48
"""Requests that are open at a time: more than there are places."""
CANCELLED = 0.15
"""Share of the requests that are given up on the way."""
TEMPLATE = 160
"""Tokens that a chat template adds, at most."""
GROWTH_MB = 48
"""More than a stage may grow while it serves: its places have all been used before."""


@dataclass(frozen=True)
class Job:
    """One request of the soak."""

    chat: Chat
    params: SamplingParams
    cancel_after: int | None
    """Tokens after which it is given up; None to see it to its end."""

    @property
    def certain(self) -> bool:
        """Its tokens do not depend on the tree, nor on what is beside it."""
        return self.params.temperature == 0 or self.params.top_p is not None


@dataclass(frozen=True)
class Outcome:
    """How it ended."""

    tokens: tuple[int, ...]
    reason: str


def make_jobs(count: int, seed: int, longest: int, room: int) -> list[Job]:
    """Seeded: the same in every run. Questions have `room` characters at most."""
    draw = random.Random(seed)
    texts = [message.content for (message,) in prompts()]
    found = []
    for number in range(count):
        # Of one question up to six, so that short and long prompts, alike and new ones come.
        asked = " ".join(draw.choices(texts, k=draw.choice((1, 1, 1, 2, 3, 6))))[:room]
        way = draw.random()
        if way < 0.5:
            how: dict[str, Any] = {"temperature": 0.0}
        elif way < 0.75:
            how = {"temperature": 0.8, "top_p": 0.9, "seed": number}
        else:
            how = {"temperature": 0.7, "seed": number}
        limit = draw.randint(1, longest)
        after = draw.randint(0, limit) if draw.random() < CANCELLED else None
        chat = (Message("user", asked),)
        found.append(Job(chat, SamplingParams(max_tokens=limit, **how), after))
    return found


async def ask(client: EngineClient, job: Job, *, cancel: bool = True) -> Outcome:
    """One request to its end, or until it is given up."""
    tokens: list[int] = []
    stream = client.submit(messages=job.chat, params=job.params)
    limit = job.cancel_after if cancel else None
    if limit == 0:
        client.cancel(stream.request_id)
    async for event in stream:
        match event:
            case Tokens():
                before = len(tokens)
                tokens += event.token_ids
                if limit is not None and before < limit <= len(tokens):
                    client.cancel(stream.request_id)
            case Finished():
                return Outcome(tuple(tokens), event.finish_reason)
            case Failed():
                raise EngineError(event.message)
    raise EngineError("an answer never ended")


def wrong(job: Job, got: Outcome, alone: Outcome) -> bool:
    """Whether an answer is not that of the request asked alone."""
    if got.reason == "cancelled":
        return got.tokens != alone.tokens[: len(got.tokens)]
    return got != alone


def main(words: Sequence[str]) -> int:
    """Run the soak; its last line is the JSON. Exit code 1 when anything is not as it should be."""
    args = _parser().parse_args(words)
    config = config_of(args)
    model = ModelConfig.from_folder(model_folder(config))
    layers = model.num_hidden_layers
    config = msgspec.structs.replace(
        config, stage_num_hidden_layers_list=even_split(layers, args.world)
    )
    # A character is a token at most; the template takes some too.
    room = min(config.max_kv_cache_length, model.context_limit) - args.longest - TEMPLATE
    if room < 1:
        raise ConfigError(f"--longest {args.longest}: leaves no room for a question")
    soak = Soak(config, layers, make_jobs(args.requests, args.seed, args.longest, room))
    if code := run_to_end(soak.run()):
        return code
    return soak.report(machine(usable_cores(), ("torch",)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jupiter bench soak", description=__doc__.split("\n")[0].partition(": ")[2]
    )
    add_config_options(parser)
    parser.add_argument("--requests", type=positive, default=REQUESTS, metavar="N")
    parser.add_argument("--world", type=positive, default=WORLD, metavar="N", help="stages")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--longest", type=positive, default=64, metavar="N", help="of the answers' max_tokens"
    )
    return parser


@dataclass
class Soak:
    """One soak over one engine, and the engine that answers alone."""

    config: JupiterConfig
    layers: int
    jobs: list[Job]
    outcomes: list[Outcome] = field(default_factory=list)
    alone: dict[int, Outcome] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    """tokens/s of the first and of the second half."""
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    """Memory of each stage, MB."""
    again: list[int] = field(default_factory=list)
    """Jobs that the same engine answered otherwise afterwards."""

    async def run(self) -> None:
        """All requests, then the comparison."""
        client = EngineClient(self.config)
        try:
            await client.start()
            await self._fill_places(client)
            self.before = memory_mb(client)
            half = len(self.jobs) // 2
            for part in (self.jobs[:half], self.jobs[half:]):
                await self._half(client, part)
            self.after = memory_mb(client)
            say("the same engine once more, one at a time")
            first = [at for at, job in enumerate(self.jobs) if job.certain][:8]
            late = {at: await ask(client, self.jobs[at], cancel=False) for at in first}
        finally:
            await client.stop()
        await self._ask_alone()
        self.again = [at for at, outcome in late.items() if outcome != self.alone[at]]

    async def _fill_places(self, client: EngineClient) -> None:
        """The longest requests in every place: from then on no memory is touched first."""
        longest = max(self.jobs, key=lambda job: len(job.chat[0].content))
        limit = max(job.params.max_tokens or 1 for job in self.jobs)
        params = SamplingParams(temperature=1.0, top_p=1.0, seed=1, max_tokens=limit)
        say("filling every place once")
        job = Job(longest.chat, params, None)
        await asyncio.gather(*(ask(client, job) for _ in range(self.config.max_num_seqs)))

    async def _half(self, client: EngineClient, jobs: Sequence[Job]) -> None:
        free = asyncio.Semaphore(OPEN)

        async def one(job: Job) -> Outcome:
            async with free:
                return await ask(client, job)

        began = time.perf_counter()
        found = await asyncio.gather(*map(one, jobs))
        seconds = time.perf_counter() - began
        tokens = sum(len(outcome.tokens) for outcome in found)
        self.rates.append(tokens / seconds)
        self.outcomes += found
        say(f"{len(self.outcomes)} of {len(self.jobs)} requests, {tokens / seconds:.0f} tokens/s")

    async def _ask_alone(self) -> None:
        config = msgspec.structs.replace(
            self.config,
            stage_num_hidden_layers_list=[self.layers],
            medusa_head_path=None,
            medusa_num_heads=0,
            max_num_seqs=1,
        )
        client = EngineClient(config)
        say("every certain request alone, on one stage without heads")
        try:
            await client.start()
            for at, job in enumerate(self.jobs):
                if job.certain:
                    self.alone[at] = await ask(client, job, cancel=False)
        finally:
            await client.stop()

    def report(self, where: str) -> int:
        """What was found, for people and as JSON; returns the exit code."""
        pairs = zip(self.jobs, self.outcomes, strict=True)
        bad = [
            at
            for at, (job, got) in enumerate(pairs)
            if at in self.alone and wrong(job, got, self.alone[at])
        ]
        growth = [b - a for a, b in zip(self.before, self.after, strict=True)]
        cancelled = sum(outcome.reason == "cancelled" for outcome in self.outcomes)
        stages = ",".join(map(str, self.config.stage_num_hidden_layers_list))
        print(where)
        print(f"{len(self.jobs)} requests over stages {stages}, {cancelled} of them cancelled")
        print(f"answers compared with those alone: {len(self.alone)}, {len(bad)} of them differ")
        print(f"asked again of the same engine: {len(self.again)} differ")
        for rank, (was, more) in enumerate(zip(self.before, growth, strict=True)):
            print(f"stage {rank}: {was:.0f} MB before, {more:+.1f} MB after")
        print(f"tokens/s of the two halves: {self.rates[0]:.0f}, {self.rates[1]:.0f}")
        failed = bool(bad or self.again or any(more > GROWTH_MB for more in growth))
        line = {
            "bench": "soak",
            "ok": not failed,
            "requests": len(self.jobs),
            "cancelled": cancelled,
            "compared": len(self.alone),
            "differ": bad,
            "differ_later": self.again,
            "growth_mb": [round(more, 1) for more in growth],
            "tokens_per_s": [round(rate, 1) for rate in self.rates],
            "machine": where,
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)
        return ExitCode.SOME_FAILED if failed else ExitCode.OK


def memory_mb(client: EngineClient) -> list[float]:
    """Resident memory of each stage's process."""
    pids = [client.stages[rank].pid for rank in sorted(client.stages)]
    return [psutil.Process(pid).memory_info().rss / 1e6 for pid in pids]
