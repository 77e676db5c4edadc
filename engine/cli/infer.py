"""`jupiter infer`: answers from a model folder or straight from a training checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import ExitCode
from engine.training.args_infer import InferArguments
from engine.training.args_parse import parse
from engine.training.args_table import help_text

PROG = "jupiter infer"


def main(words: Sequence[str]) -> int:
    """Run the command with the words that follow it; returns the exit code."""
    if "--help" in words or "-h" in words:
        usage = f"{PROG} --model DIR | --mcore_model RUN [--val_dataset FILE...] [...]"
        summary = "Answer questions from the terminal, from a pipe, or from a file."
        print(help_text(usage, summary, [("arguments", InferArguments)]))
        return ExitCode.OK
    from engine.training.infer import infer

    args, _ = parse(words, InferArguments)
    return infer(args)
