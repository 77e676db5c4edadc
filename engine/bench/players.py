"""Who answers in the decode bench: our engine through its client, others as child processes."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Protocol

import msgspec

from engine.bench.figures import Run, run_of
from engine.bench.peer import Ask, Reply
from engine.bench.prompts import Chat
from engine.client import EngineClient
from engine.config import JupiterConfig
from engine.errors import EngineError, JupiterError
from engine.launch import module_environment
from engine.protocol import Failed, Finished, SamplingParams, Tokens

MAX_LINE = 1 << 24
STOP_S = 5.0
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""How threads wait: ours sleep, for the sake of the other stages."""


class PeerError(JupiterError):
    """Another engine that cannot take part; the bench goes on without it."""


@dataclass(frozen=True)
class Question:
    """One prompt in both forms: as a chat, and as the tokens that its template makes of it."""

    chat: Chat
    tokens: tuple[int, ...]


class Player(Protocol):
    """An engine in the bench. Several players may share one process."""

    name: str

    async def start(self) -> None:
        """Load the model; raises a JupiterError."""

    async def answer(self, question: Question, max_tokens: int) -> Run:
        """Answer greedily; raises a JupiterError."""

    async def stop(self) -> None:
        """Leave no process; idempotent."""


class OurEngine:
    """Jupiter, through the same client as the chat's."""

    def __init__(self, name: str, config: JupiterConfig) -> None:
        self.name = name
        self._client = EngineClient(config)

    async def start(self) -> None:
        """Start the workers."""
        await self._client.start()

    async def answer(self, question: Question, max_tokens: int) -> Run:
        """Times are taken here: the queue and the text are part of them."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0)
        tokens: list[int] = []
        first, first_at = 0, 0.0
        asked = time.perf_counter()
        stream = self._client.submit(messages=question.chat, params=params)
        async for event in stream:
            now = time.perf_counter() - asked
            match event:
                case Tokens():
                    tokens += event.token_ids
                    if not first:
                        first, first_at = len(tokens), now
                case Finished():
                    return Run(
                        tokens=tuple(tokens),
                        ttft_s=first_at,
                        decode_tokens=len(tokens) - first,
                        decode_s=now - first_at,
                        steps=event.metrics.decode_steps,
                    )
                case Failed():
                    raise EngineError(event.message)
        raise EngineError(f"{self.name}: the answer never ended")

    async def stop(self) -> None:
        """Stop the workers."""
        await self._client.stop()


class PeerProcess:
    """`python -m engine.bench.peer ...`, started once for all the players that it serves."""

    def __init__(self, words: Sequence[str], threads: int) -> None:
        self._words = words
        self._threads = threads
        self._process: asyncio.subprocess.Process | None = None
        self._errors: IO[bytes] | None = None

    async def start(self) -> None:
        """Returns once it has loaded its models; at once while it runs."""
        if self._process is not None:
            return
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `stop`)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "engine.owned", str(os.getpid())),
            *("engine.bench.peer", *self._words),
            stdin=PIPE,
            stdout=PIPE,
            stderr=self._errors,
            limit=MAX_LINE,
            start_new_session=True,
            env=self._environment(),
        )
        await self._reply()

    def _environment(self) -> dict[str, str]:
        """As it comes: what may be set for our engine's stages is not for others."""
        return {
            **{name: value for name, value in os.environ.items() if name not in WAITING},
            **module_environment(),
            "OMP_NUM_THREADS": str(self._threads),
            "HF_HUB_OFFLINE": "1",  # all that it reads is here
        }

    async def ask(self, request: Ask) -> Reply:
        """One answer. Raises PeerError with the process's last words when it has ended."""
        assert self._process is not None and self._process.stdin is not None
        with suppress(ConnectionError):  # what it died of is read below
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
            await self._process.stdin.drain()
        return await self._reply()

    async def _reply(self) -> Reply:
        assert self._process is not None and self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            await self._process.wait()
            raise PeerError(self._last_words())
        try:
            return msgspec.json.decode(line, type=Reply)
        except msgspec.DecodeError:
            raise PeerError(f"it said: {line[:200].decode(errors='replace').strip()}") from None

    def _last_words(self) -> str:
        assert self._process is not None and self._errors is not None
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else f"ended with code {self._process.returncode}"

    async def stop(self) -> None:
        """End it: it leaves when nothing more can be asked, or is killed."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._errors is not None:
            self._errors.close()
            self._errors = None


class Peer:
    """One way to ask a peer process."""

    def __init__(self, name: str, process: PeerProcess, stop_ids: Sequence[int], mode: str) -> None:
        self.name = name
        self.mode = mode
        self._process = process
        self._stop_ids = tuple(stop_ids)

    async def start(self) -> None:
        """Start its process."""
        await self._process.start()

    async def answer(self, question: Question, max_tokens: int) -> Run:
        """Times are those of the process itself: no pipe is in them."""
        ask = Ask(question.tokens, self._stop_ids, max_tokens, self.mode)
        reply = await self._process.ask(ask)
        if not reply.arrivals:
            raise PeerError("it answered nothing")
        return run_of(reply.tokens, reply.arrivals, reply.first)

    async def stop(self) -> None:
        """Stop its process."""
        await self._process.stop()
