"""`jupiter infer`: a conversation at the prompt, or a file of questions, over the staged engine."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.checkpoint.mcore_files import system_of
from engine.checkpoint.mcore_view import as_model
from engine.checkpoint.sources import fetch
from engine.config import JupiterConfig, load_config
from engine.errors import ConfigError, ExitCode
from engine.protocol import Failed, Message
from engine.training.answer_file import AnswerFile
from engine.training.answering import AnswerRun, Prompt, Sampling, left, seed_of, with_base
from engine.training.args_infer import InferArguments
from engine.training.chat_loop import ChatLoop
from engine.training.generate_progress import make_progress
from engine.training.row_files import DataError
from engine.training.rows import Row, read_split, with_system

PREFIX = "jupiter infer: "


@dataclass(frozen=True)
class Question(Prompt):
    """A conversation up to its last question."""

    messages: tuple[Message, ...] = ()
    label: str | None = None
    """The answer that the row has itself."""


def infer(args: InferArguments) -> int:
    """Answer as the arguments say; returns the exit code (see ExitCode).

    Raises:
        JupiterError: bad input, or the engine failed; answers that are done are in the file.
    """
    if args.result_path is not None and not args.val_dataset:
        raise ConfigError("--result_path: goes with --val_dataset")
    with _config(args) as config:
        if args.system is None and (args.model or args.mcore_model):
            folder = fetch(config.base_model_name_or_path, _say)
            args = dataclasses.replace(args, system=system_of(folder))
        sampling = _sampling(args, config)
        if args.val_dataset:
            return _answer_file(args, config, sampling)
        return ChatLoop(config, sampling, args.system, stream=args.stream).run()


@contextmanager
def _config(args: InferArguments) -> Iterator[JupiterConfig]:
    """The engine that answers."""
    config = load_config(args.config)
    split = args.stage_num_hidden_layers_list
    more: dict[str, object] = {
        "torch_dtype": args.torch_dtype,
        "load_in_8bit": args.load_in_8bit,
        "max_num_seqs": args.max_num_seqs,
        "medusa_head_path": args.medusa_head_path,
    }
    given = {name: value for name, value in more.items() if value is not None}
    if args.mcore_model is not None:
        model = None if args.model is None else fetch(args.model, _say)
        with as_model(Path(args.mcore_model).expanduser(), model) as folder:
            yield msgspec.structs.replace(with_base(config, str(folder), split), **given)
    elif args.model is not None:
        yield msgspec.structs.replace(with_base(config, args.model, split), **given)
    else:
        if split is not None:
            given["stage_num_hidden_layers_list"] = split
        yield msgspec.structs.replace(config, **given)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _sampling(args: InferArguments, config: JupiterConfig) -> Sampling:
    # top_p is always named where something is drawn: that asks for the model's own distribution,
    # which typical acceptance is not.
    top_p = (config.top_p if args.top_p is None else args.top_p) if args.temperature else None
    return Sampling(args.max_new_tokens, args.temperature, top_p, args.seed)


def _answer_file(args: InferArguments, config: JupiterConfig, sampling: Sampling) -> int:
    questions = read_questions(args)
    name = args.result_path or f"infer_result/{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    output = Path(name).expanduser().absolute()
    for spec in args.val_dataset:
        if output.exists() and Path(spec).exists() and output.samefile(spec):
            raise ConfigError(f"--result_path {name}: is an input itself; name another file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--result_path {name}: {error.strerror}") from None
    with AnswerFile(output, _made_by(args, sampling)) as file:
        todo = left(questions, file)
        skipped = len(questions) - len(todo)
        progress = make_progress(args.progress, len(todo), skipped=skipped, prefix=PREFIX)
        if not todo:
            progress.summary()
            caught = None
        else:
            caught = asyncio.run(_FileRun(sampling, config, todo, file, progress).serve())
    if caught is not None:
        return 128 + caught
    print(output, flush=True)
    return ExitCode.SOME_FAILED if progress.failed else ExitCode.OK


def _made_by(args: InferArguments, sampling: Sampling) -> dict[str, object]:
    """What decides the answers, kept in each line."""
    how: dict[str, object] = {
        "model": args.mcore_model or args.model,
        "system": args.system,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
    }
    if sampling.temperature:
        how |= {"top_p": sampling.top_p, "seed": sampling.seed}
    return how


def read_questions(args: InferArguments) -> list[Question]:
    """What the rows of `val_dataset` ask, each id once. Raises DataError."""
    found: dict[str, tuple[Question, Row]] = {}
    for row in read_split(args.val_dataset, seed=args.seed):
        question = _question(with_system(row, args.system))
        before, first = found.setdefault(question.id, (question, row))
        if before != question:
            raise DataError(f"{row.where}: id {question.id!r} is already that of {first.where}")
    return [question for question, _ in found.values()][: args.limit]


def _question(row: Row) -> Question:
    asked = [at for at, message in enumerate(row.messages) if message.role == "user"]
    if not asked:
        raise DataError(f"{row.where}: has no user message to answer")
    messages = row.messages[: asked[-1] + 1]
    after = row.messages[asked[-1] + 1 :]
    label = after[0].content if after and after[0].role == "assistant" else None
    asks = tuple(message.content for message in messages if message.role == "user")
    system = messages[0].content if messages[0].role == "system" else None
    return Question(row.id, system, asks, messages, label)


class _FileRun(AnswerRun):
    """Answers the last question of each conversation."""

    async def converse(self, prompt: Prompt) -> str | None:
        assert isinstance(prompt, Question)
        answer = await self.ask(prompt.messages, seed_of(self.sampling.seed, prompt.id, 0))
        if isinstance(answer, Failed):
            return answer.message
        text, reason = answer
        messages = [*prompt.messages, Message("assistant", text)]
        self.file.write(prompt.id, messages, reason, response=text, labels=prompt.label)
        return None
