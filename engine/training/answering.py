"""Answering many prompts with the engine: what self-distillation and `jupiter infer` share.

Free of torch: the engine's workers do the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from engine.client import ClientState, EngineClient, StateChanged, Update
from engine.config import JupiterConfig
from engine.errors import ConfigError, EngineError
from engine.protocol import Failed, Finished, Message, SamplingParams, Tokens
from engine.training.answer_file import AnswerFile
from engine.training.generate_progress import Progress

P = TypeVar("P", bound="Prompt")
QUEUE_AHEAD = 4
"""Requests that wait in the engine, so that a place that falls free is taken at once."""


@dataclass(frozen=True)
class Prompt:
    """A conversation to be had."""

    id: str
    system: str | None
    asks: tuple[str, ...]
    """What the user says, turn by turn."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int | None
    """None for as many as the context has room for."""
    temperature: float
    top_p: float | None
    seed: int

    def params(self, seed: int) -> SamplingParams:
        """The parameters of a request with a seed of its own."""
        return SamplingParams(
            max_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )


def left(prompts: Sequence[P], file: AnswerFile) -> list[P]:
    """The prompts that are not in the file yet."""
    todo = []
    for prompt in prompts:
        asked = file.done.get(prompt.id)
        if asked is None:
            todo.append(prompt)
        elif asked != prompt.asks[: len(asked)]:
            raise ConfigError(
                f"{file.path}: {prompt.id!r} was asked something else than the data set says now; "
                "name a new output file"
            )
    return todo


def with_base(
    config: JupiterConfig, model: str, split: Sequence[int] | None = None
) -> JupiterConfig:
    """The config with another model, on one stage or split so; heads are those merged into it.

    Raises CheckpointError.
    """
    # Only needed here.
    from engine.checkpoint.sources import fetch
    from engine.model.config import ModelConfig

    folder = fetch(model, lambda line: print(line, file=sys.stderr))
    layers = ModelConfig.from_folder(folder).num_hidden_layers
    return msgspec.structs.replace(
        config,
        base_model_name_or_path=model,
        stage_num_hidden_layers_list=list(split or [layers]),
        medusa_head_path=None,
        medusa_num_heads=None,
        model_keys={},
    )


class AnswerRun:
    """One run of the engine over the prompts that are left."""

    def __init__(
        self,
        sampling: Sampling,
        config: JupiterConfig,
        todo: Sequence[Prompt],
        file: AnswerFile,
        progress: Progress,
    ) -> None:
        self.sampling, self._config, self.file, self._progress = sampling, config, file, progress
        self._pending = iter(todo)
        self._width = min(config.max_num_seqs + QUEUE_AHEAD, len(todo))
        self._client = EngineClient(config, listener=self._on_update)
        self._death = ""

    async def serve(self) -> int | None:
        """Answer all; the signal that ended it before, if one did. Raises JupiterError."""
        work = asyncio.create_task(self._answer_all())
        problem: EngineError | None = None
        with _ended_by_signals(work, self._client, self._progress) as caught:
            try:
                await work
            except asyncio.CancelledError:
                if not caught:
                    raise
            except EngineError as error:
                problem = error
            finally:
                await self._client.stop()
        if caught:
            return caught[0]
        if problem is not None:
            # The cause, rather than what a request met while the engine was going down.
            raise EngineError(self._death or str(problem))
        return None

    def _on_update(self, update: Update) -> None:
        if isinstance(update, StateChanged) and update.state is ClientState.DEAD:
            self._death = self._death or update.reason
        self._progress.engine(update)

    async def _answer_all(self) -> None:
        await self._client.start()
        self._progress.start()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._width):
                    group.create_task(self._answer_some())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            self._progress.summary()

    async def _answer_some(self) -> None:
        """Take prompts one after another until none is left."""
        for prompt in self._pending:
            self._progress.answered(prompt.id, await self.converse(prompt))

    async def converse(self, prompt: Prompt) -> str | None:
        """Have one conversation and write it; why that failed, if it did.

        An answer that a limit cut is the last: nobody would go on from half an answer. So is one
        after which there is no room in the context.
        """
        messages = [] if prompt.system is None else [Message("system", prompt.system)]
        reason = ""
        for turn, ask in enumerate(prompt.asks):
            messages.append(Message("user", ask))
            answer = await self.ask(messages, seed_of(self.sampling.seed, prompt.id, turn))
            if isinstance(answer, Failed):
                messages.pop()
                if reason:
                    break
                return answer.message
            text, reason = answer
            messages.append(Message("assistant", text))
            if reason == "length":
                break
        self.file.write(prompt.id, messages, reason)
        return None

    async def ask(self, messages: Sequence[Message], seed: int) -> tuple[str, str] | Failed:
        """Text and finish reason of one answer, or why there is none."""
        stream = self._client.submit(messages=messages, params=self.sampling.params(seed))
        text: list[str] = []
        async for event in stream:
            if isinstance(event, Tokens):
                text.append(event.text)
                self._progress.tokens(len(event.token_ids))
            elif isinstance(event, Failed):
                return event
            elif isinstance(event, Finished) and event.finish_reason == "length":
                # The last character may have been cut in half.
                return "".join(text).rstrip("\ufffd"), "length"
            elif isinstance(event, Finished) and event.finish_reason == "stop":
                return "".join(text), "stop"
        return Failed(
            request_id=stream.request_id,
            message="the engine gave no whole answer",
            code="internal_error",
        )


def seed_of(seed: int, name: str, turn: int) -> int:
    """A seed for each answer of its own, the same in whatever order they come."""
    digest = hashlib.sha256(f"{seed}/{name}/{turn}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextlib.contextmanager
def _ended_by_signals(
    work: asyncio.Task[None], client: EngineClient, progress: Progress
) -> Iterator[list[int]]:
    """Cancel `work` on the first Ctrl+C or SIGTERM, end the process at once on the second.

    Yields the list that the first signal is put into.
    """
    caught: list[int] = []

    def end(number: int) -> None:
        if caught:
            client.kill_now()
            os._exit(128 + number)
        caught.append(number)
        progress.note("stopping (again to stop at once); the same command goes on with it")
        work.cancel()

    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, end, int(number))
    try:
        yield caught
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
