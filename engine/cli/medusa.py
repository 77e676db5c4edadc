"""`jupiter medusa`: train Medusa heads; `generate` and `eval` are what goes before and after.

The words are read by engine.training.args, not by argparse: they may come from a file, and forms
and docs are made of the same definitions.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.cli.training import checked
from engine.errors import ConfigError, ExitCode
from engine.training.args import GROUPS, TrainArguments
from engine.training.args_fields import arguments
from engine.training.args_medusa import EvalArguments, GenerateArguments, SelfDistillation
from engine.training.args_parse import parse, without
from engine.training.args_table import help_text

PROG = "jupiter medusa"


def main(words: Sequence[str]) -> int:
    """Run the command with the words that follow it; returns the exit code."""
    command, rest = ("train", list(words))
    if words and words[0] in ("train", "generate", "eval"):
        command, rest = words[0], list(words[1:])
    if not words or "--help" in rest or "-h" in rest:
        print(_help(command))
        return ExitCode.OK if words else ExitCode.BAD_INPUT
    if command == "generate":
        return _generate(rest)
    if command == "eval":
        return _eval(rest)
    return _train(rest)


def _train(words: Sequence[str]) -> int:
    args = checked(words, "medusa")
    if args.generate is not None:
        output = args.generate_output or f"{args.generate}.answers.jsonl"
        code = _answer_first(args, args.generate, output)
        if code not in (ExitCode.OK, ExitCode.SOME_FAILED):
            return code
        kept = without(words, TrainArguments, ["dataset", *arguments(SelfDistillation)])
        words = [*kept, "--generate", "none", "--dataset", *args.dataset, output]
    from engine.training.launch import launch

    return int(launch(words))


def _answer_first(args: TrainArguments, prompts: str, output: str) -> int:
    from engine.training.generate import generate

    return generate(
        GenerateArguments(
            dataset=[prompts],
            output=output,
            model=args.model,
            config=args.config,
            system=args.system,
            seed=args.seed,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            max_num_seqs=args.max_num_seqs,
            limit=args.limit,
            progress=args.progress,
        )
    )


def _generate(words: Sequence[str]) -> int:
    from engine.training.generate import generate

    args, _ = parse(words, GenerateArguments)
    return generate(args)


def _eval(words: Sequence[str]) -> int:
    args, _ = parse(words, EvalArguments)
    if not args.dataset:
        raise ConfigError("--dataset: name the files to evaluate on")
    from engine.training.head_report import run

    return int(run(args))


def _help(command: str) -> str:
    if command == "generate":
        usage = f"{PROG} generate --dataset PROMPTS... --output OUT.jsonl [--name value ...]"
        summary = "Have the model answer prompts; goes on with an OUT.jsonl that exists."
        return help_text(usage, summary, [("arguments", GenerateArguments)])
    if command == "eval":
        usage = f"{PROG} eval --dataset FILE... [--name value ...]"
        summary = "Report how often each head is right, and the tokens accepted per step."
        return help_text(usage, summary, [("arguments", EvalArguments)])
    usage = f"{PROG} [FILE.json|FILE.yaml] --dataset FILE... [--name value ...]"
    summary = (
        "Train Medusa heads. NPROC_PER_NODE=N runs N ranks. Also: medusa generate, medusa eval."
    )
    return help_text(usage, summary, GROUPS)
