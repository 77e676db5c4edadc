"""Self-distillation: the model answers prompts, many at a time, and learns from what it wrote.

The prompts' own answers are not used: of a conversation each user message is asked in turn, and
the model's answers stand between them. Free of torch: the engine's workers do the work.
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
from pathlib import Path

import msgspec

from engine.client import ClientState, EngineClient, StateChanged, Update
from engine.config import JupiterConfig, load_config
from engine.errors import ConfigError, EngineError, ExitCode
from engine.protocol import Failed, Finished, Message, SamplingParams, Tokens
from engine.training.answer_file import AnswerFile
from engine.training.args_medusa import GenerateArguments
from engine.training.args_resolve import model_suffix
from engine.training.generate_progress import Progress, make_progress
from engine.training.row_files import DataError
from engine.training.rows import Row, read_questions, read_split, with_system

QUEUE_AHEAD = 4
"""Requests that wait in the engine, so that a place that falls free is taken at once."""


@dataclass(frozen=True)
class Prompt:
    """A conversation to be had."""

    id: str
    system: str | None
    asks: tuple[str, ...]
    """What the user says, turn by turn."""


def generate(args: GenerateArguments) -> int:
    """Have every prompt answered and written; returns the exit code (see ExitCode).

    An output that exists is gone on with: what is in it is not asked again.

    Raises:
        JupiterError: bad input, or the engine failed; what is done is in the file.
    """
    if not args.dataset:
        raise ConfigError("--dataset: name the prompt files")
    if args.output is None:
        raise ConfigError("--output: name the file for the answers")
    prompts = read_prompts(args)
    config = engine_config(args)
    output = Path(args.output).expanduser()
    for name in (*args.dataset, *args.batch_input):
        if output.exists() and Path(name).exists() and output.samefile(name):
            raise ConfigError(f"--output {args.output}: is an input itself; name another file")
    with AnswerFile(output, made_by(args, config)) as file:
        todo = _left(prompts, file)
        progress = make_progress(args.progress, len(todo), skipped=len(prompts) - len(todo))
        if not todo:
            progress.summary()
            return ExitCode.OK
        run = _Run(args, config, todo, file, progress)
        caught = asyncio.run(run.serve())
    if caught is not None:
        return 128 + caught
    return ExitCode.SOME_FAILED if progress.failed else ExitCode.OK


def read_prompts(args: GenerateArguments) -> list[Prompt]:
    """The prompts that `args` names, each id once. Raises DataError."""
    questions = read_questions(args.batch_input) if args.batch_input else None
    rows = read_split(args.dataset, seed=args.seed, questions=questions)
    found: dict[str, tuple[Prompt, Row]] = {}
    for row in rows:
        prompt = _prompt(with_system(row, args.system))
        before, first = found.setdefault(prompt.id, (prompt, row))
        if before != prompt:
            raise DataError(f"{row.where}: id {prompt.id!r} is already that of {first.where}")
    return [prompt for prompt, _ in found.values()][: args.limit]


def _prompt(row: Row) -> Prompt:
    asks = tuple(message.content for message in row.messages if message.role == "user")
    if not asks:
        raise DataError(f"{row.where}: has no user message to answer")
    first = row.messages[0]
    return Prompt(row.id, first.content if first.role == "system" else None, asks)


def engine_config(args: GenerateArguments) -> JupiterConfig:
    """The engine that answers: the config's, or `--model` on one stage without heads."""
    config = load_config(args.config)
    if args.model is not None:
        # Only needed here.
        from engine.checkpoint.sources import fetch
        from engine.model.config import ModelConfig

        folder = fetch(args.model, lambda line: print(line, file=sys.stderr))
        layers = ModelConfig.from_folder(folder).num_hidden_layers
        config = msgspec.structs.replace(
            config,
            base_model_name_or_path=args.model,
            stage_num_hidden_layers_list=[layers],
            medusa_head_path=None,
            medusa_num_heads=0,
            model_keys={},
        )
    if args.max_num_seqs is not None:
        config = msgspec.structs.replace(config, max_num_seqs=args.max_num_seqs)
    return config


def made_by(args: GenerateArguments, config: JupiterConfig) -> dict[str, object]:
    """What decides the answers, kept in each row."""
    how: dict[str, object] = {
        "model": model_suffix(config.base_model_name_or_path),
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
    }
    if args.temperature:
        how |= {"top_p": _top_p(args, config), "seed": args.seed}
    return how


def _top_p(args: GenerateArguments, config: JupiterConfig) -> float:
    # Always named: that asks for sampling from the model's own distribution, which typical
    # acceptance is not.
    return config.top_p if args.top_p is None else args.top_p


def _left(prompts: Sequence[Prompt], file: AnswerFile) -> list[Prompt]:
    """The prompts that are not in the file yet."""
    left = []
    for prompt in prompts:
        asked = file.done.get(prompt.id)
        if asked is None:
            left.append(prompt)
        elif asked != prompt.asks[: len(asked)]:
            raise ConfigError(
                f"{file.path}: {prompt.id!r} was asked something else than the data set says now; "
                "name a new output file"
            )
    return left


class _Run:
    """One run of the engine over the prompts that are left."""

    def __init__(
        self,
        args: GenerateArguments,
        config: JupiterConfig,
        todo: Sequence[Prompt],
        file: AnswerFile,
        progress: Progress,
    ) -> None:
        self._args, self._config, self._file, self._progress = args, config, file, progress
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
            self._progress.answered(prompt.id, await self._converse(prompt))

    async def _converse(self, prompt: Prompt) -> str | None:
        """Have one conversation and write it; why that failed, if it did.

        An answer that a limit cut is the last: nobody would go on from half an answer. So is one
        after which there is no room in the context.
        """
        messages = [] if prompt.system is None else [Message("system", prompt.system)]
        reason = ""
        for turn, ask in enumerate(prompt.asks):
            messages.append(Message("user", ask))
            answer = await self._ask(messages, _seed(self._args.seed, prompt.id, turn))
            if isinstance(answer, Failed):
                messages.pop()
                if reason:
                    break
                return answer.message
            text, reason = answer
            messages.append(Message("assistant", text))
            if reason == "length":
                break
        self._file.write(prompt.id, messages, reason)
        return None

    async def _ask(self, messages: Sequence[Message], seed: int) -> tuple[str, str] | Failed:
        """Text and finish reason of one answer, or why there is none."""
        args = self._args
        params = SamplingParams(
            max_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=_top_p(args, self._config) if args.temperature else None,
            seed=seed,
        )
        stream = self._client.submit(messages=messages, params=params)
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


def _seed(seed: int, name: str, turn: int) -> int:
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
