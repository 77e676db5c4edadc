"""`jupiter`: one small module per subcommand, imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

from engine.errors import ExitCode, JupiterError

COMMANDS = {
    "bench": "measure on this machine: `bench batch`, `decode`, `outline`, `prefill`, `soak`, …",
    "export": "convert between Hugging Face folders and Megatron-Core checkpoints",
    "fetch": "bring a model into the cache and print its folder",
    "infer": "answer questions with a model folder or a training checkpoint",
    "join": "compute stages on this machine for a `jupiter-tui --nnodes` on another",
    "medusa": "train Medusa heads (also: `medusa generate`, `medusa eval`)",
    "merge": "write base model and Medusa heads as one Hugging Face folder",
    "plan": "measure stages and links, and choose split and chunks",
    "pt": "train the model itself on plain text (continued pretraining)",
    "run": "answer one prompt in this process with the merged model",
    "sft": "train the model itself on answers (supervised fine-tuning)",
    "stage": "run one stage by hand; start one per rank in separate shells",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jupiter COMMAND ...`; returns the exit code (see ExitCode).

    Each command is a module `engine.cli.<command>` with `add_arguments(parser)` and
    `run(args) -> int`, or with `main(words) -> int` where it reads its words itself.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        module = importlib.import_module(f"engine.cli.{words[0]}")
        if hasattr(module, "main"):
            return _guarded(words[0], lambda: int(module.main(words[1:])))
    parser = argparse.ArgumentParser(
        prog="jupiter",
        description="Staged, speculative LLM inference.",
        epilog="`jupiter COMMAND --help` tells more; `jupiter-tui` opens the terminal workbench.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if words and words[0] == name:
            importlib.import_module(f"engine.cli.{name}").add_arguments(command)
    args = parser.parse_args(words)
    module = importlib.import_module(f"engine.cli.{args.command}")
    return _guarded(args.command, lambda: int(module.run(args)))


def _guarded(command: str, work: Callable[[], int]) -> int:
    """The exit code of `work`; what a user can cause is said in one line."""
    try:
        return work()
    except JupiterError as error:
        print(f"jupiter {command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
