"""Trials on a live engine: something happens in the middle of a greedy answer."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Literal

from msgspec.structs import replace

from engine.bench.faults import harm
from engine.bench.faults.counts import Counts
from engine.bench.faults.processes import Witness
from engine.bench.prompts import OWN
from engine.client import ClientState, EngineClient, StateChanged, Update
from engine.config import JupiterConfig
from engine.errors import EngineError
from engine.protocol import Failed, Finished, Message, SamplingParams, Tokens

AnswerKind = Literal["kill", "stop", "link", "delay", "resplit"]
LATEST_S = 60.0
"""An answer that is not there so long after its fault has not survived it."""
LONGEST_DELAY_S = 0.8
"""Less than what counts as a hang."""
PROMPTS = 4


class AnswerTrials:
    """One engine, the same questions over and over, each disturbed once.

    Args:
        config: of the engine.
        rng: decides whom it meets, when, and how.
        max_tokens: of an answer.
        say: takes a line about each trial.
    """

    def __init__(
        self, config: JupiterConfig, rng: random.Random, max_tokens: int, say: Callable[[str], None]
    ) -> None:
        self._config, self._rng, self._say = config, rng, say
        self._params = SamplingParams(temperature=0, max_tokens=max_tokens)
        self._client = EngineClient(config, listener=self._listen)
        self._whole: dict[str, list[int]] = {}
        self._witness = Witness()
        self._noticed = self._back = 0.0

    def _listen(self, update: Update) -> None:
        if not isinstance(update, StateChanged):
            return
        if update.state is ClientState.RECOVERING:
            self._noticed, self._back = self._noticed or time.monotonic(), 0.0
            self._say("  " + update.reason.partition("\n")[0])
        elif self._noticed and not self._back:
            self._back = time.monotonic()

    async def run(self, kinds: list[AnswerKind]) -> dict[str, Counts]:
        """Go through trials of these kinds, one after the other; raises EngineError when the engine
        does not start."""
        counts: dict[str, Counts] = {kind: Counts() for kind in kinds}
        try:
            await self._client.start()
            for question in OWN[:PROMPTS]:
                self._whole[question] = await self._answer(question)
            for number, kind in enumerate(kinds, 1):
                if self._client.state is ClientState.DEAD:
                    await self._client.start()
                survived, wrong, seconds = await self._trial(kind)
                counts[kind].add(survived=survived, wrong=wrong, seconds=seconds)
                took = "n/a" if seconds is None else f"{seconds:.2f} s"
                outcome = "wrong" if wrong else "survived" if survived else "lost"
                self._say(f"{number}/{len(kinds)} {kind}: {outcome}, {took}")
        finally:
            await self._client.stop()
            last = next(reversed(counts))
            counts[last].orphans += self._witness.left()
        return counts

    async def _trial(self, kind: AnswerKind) -> tuple[bool, int, float | None]:
        """Whether the answer came, whether it is wrong, and the seconds until it went on."""
        question = self._rng.choice(list(self._whole))
        whole = self._whole[question]
        moment = self._rng.randrange(len(whole))
        self._noticed = self._back = 0.0
        tokens: list[int] = []
        arrived: list[float] = []
        done = asyncio.Event()
        fault: asyncio.Task[float] | None = None
        stream = self._client.submit(messages=[Message("user", question)], params=self._params)
        if moment == 0:
            fault = asyncio.create_task(self._disturb(kind))
        try:
            async with asyncio.timeout(LATEST_S):
                async for event in stream:
                    if isinstance(event, Tokens):
                        tokens += event.token_ids
                        arrived.append(time.monotonic())
                        if fault is None and len(tokens) >= moment:
                            fault = asyncio.create_task(self._disturb(kind))
                    elif isinstance(event, Failed):
                        raise EngineError(event.message)
                assert fault is not None
                began = await fault
                await self._settled(kind)
        except (TimeoutError, EngineError) as error:
            self._say(f"  {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            await self._end(fault)
            await self._client.stop()
            return False, 0, None
        finally:
            done.set()
        if kind == "resplit":
            return True, int(tokens != whole), began  # how long the change took
        after = [at for at in arrived if self._back and at >= self._back]
        seconds = (after[0] if after else self._back) - began if self._back else None
        return True, int(tokens != whole), seconds

    async def _disturb(self, kind: AnswerKind) -> float:
        """Do it, at once or a moment later; when it was, or how long a change of split took."""
        await asyncio.sleep(self._rng.uniform(0.0, 0.03))
        self._witness.look()
        if kind == "resplit":
            return await self._change_split()
        workers = self._client.workers()
        began = time.monotonic()
        pid = workers[self._rng.choice(sorted(workers))] if workers else 0
        if not pid:
            return began  # the one before is still being replaced
        match kind:
            case "kill":
                harm.kill(pid)
            case "stop":
                harm.stop(pid)
            case "link":
                harm.cut_links(pid)
            case "delay":
                await harm.delay(pid, self._rng.uniform(0.05, LONGEST_DELAY_S))
        return began

    async def _change_split(self) -> float:
        config = self._client.config
        layers, world = sum(config.stage_num_hidden_layers_list), config.world_size
        cuts = sorted(self._rng.sample(range(1, layers), world - 1))
        split = [b - a for a, b in zip([0, *cuts], [*cuts, layers], strict=True)]
        began = time.monotonic()
        await self._client.resplit(replace(config, stage_num_hidden_layers_list=split))
        return time.monotonic() - began

    async def _settled(self, kind: AnswerKind) -> None:
        """Wait until what was done is noticed and over: the answer may have ended before."""
        if kind in ("kill", "stop", "link"):
            while not self._back:
                await asyncio.sleep(0.01)
        while self._client.state is not ClientState.READY:
            await asyncio.sleep(0.01)

    async def _end(self, fault: asyncio.Task[float] | None) -> None:
        if fault is not None:
            fault.cancel()
            await asyncio.wait([fault])

    async def _answer(self, question: str) -> list[int]:
        tokens: list[int] = []
        stream = self._client.submit(messages=[Message("user", question)], params=self._params)
        async for event in stream:
            match event:
                case Tokens():
                    tokens += event.token_ids
                case Failed(message=message):
                    raise EngineError(message)
                case Finished():
                    break
        return tokens
