"""What the training commands share: checks, notes, help and the start of the ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from engine.errors import ConfigError, ExitCode
from engine.training.args import (
    Command,
    TrainArguments,
    groups_of,
    notes,
    parse_arguments,
)
from engine.training.args_check import validate
from engine.training.args_table import help_text


def train(words: Sequence[str], command: Command, summary: str) -> int:
    """`jupiter sft` and `jupiter pt`: run with the words that follow; returns the exit code."""
    if not words or "--help" in words or "-h" in words:
        usage = f"jupiter {command} [FILE.json|FILE.yaml] --dataset FILE... [--name value ...]"
        ranks = "NPROC_PER_NODE=N runs N ranks."
        print(help_text(usage, f"{summary} {ranks}", groups_of(command)))
        return ExitCode.OK if words else ExitCode.BAD_INPUT
    checked(words, command)
    from engine.training.launch import launch

    return int(launch(words, command))


def checked(words: Sequence[str], command: Command) -> TrainArguments:
    """The arguments, checked against each other; what has no effect is told once on stderr.

    Raises:
        ConfigError: one line that names the argument and what would be right.
    """
    args = parse_arguments(words, command)
    validate(args, _ranks())
    if "RANK" not in os.environ:  # or the command that started the ranks has told it
        for note in notes(args):
            print(f"jupiter {command}: {note}", file=sys.stderr)
    return args


def _ranks() -> int:
    """How many ranks there are, or are about to be started (variables as torchrun has them)."""
    names = ("WORLD_SIZE",) if "WORLD_SIZE" in os.environ else ("NPROC_PER_NODE", "NNODES")
    ranks = 1
    for name in names:
        text = os.environ.get(name, "1")
        if not (text.isascii() and text.isdigit() and int(text) > 0):
            raise ConfigError(f"{name}={text}: must be a whole number from 1")
        ranks *= int(text)
    return ranks
