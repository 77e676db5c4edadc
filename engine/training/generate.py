"""Self-distillation: the model answers prompts, many at a time, and learns from what it wrote.

The prompts' own answers are not used: of a conversation each user message is asked in turn, and
the model's answers stand between them. Free of torch: the engine's workers do the work.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from engine.config import JupiterConfig, load_config
from engine.errors import ConfigError, ExitCode
from engine.training.answer_file import AnswerFile
from engine.training.answering import AnswerRun, Prompt, Sampling, left, with_base
from engine.training.args_medusa import GenerateArguments
from engine.training.args_resolve import model_suffix
from engine.training.generate_progress import make_progress
from engine.training.row_files import DataError
from engine.training.rows import Row, read_questions, read_split, with_system


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
        todo = left(prompts, file)
        progress = make_progress(args.progress, len(todo), skipped=len(prompts) - len(todo))
        if not todo:
            progress.summary()
            return ExitCode.OK
        run = AnswerRun(sampling_of(args, config), config, todo, file, progress)
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
        config = with_base(config, args.model)
        config = msgspec.structs.replace(config, medusa_num_heads=0)
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


def sampling_of(args: GenerateArguments, config: JupiterConfig) -> Sampling:
    """What the arguments say."""
    top_p = _top_p(args, config) if args.temperature else None
    return Sampling(args.max_new_tokens, args.temperature, top_p, args.seed)
