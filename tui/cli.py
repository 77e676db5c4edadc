"""`jupiter-tui`: reads the command line, then opens the workbench or runs a batch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NoReturn

from engine.config import JupiterConfig, load_config
from engine.errors import ExitCode, JupiterError

if TYPE_CHECKING:
    from engine.nodes.hub import Hub

BATCH_ONLY = ("output", "resume", "progress", "max_failures", "max_num_seqs")
TELEMETRY_ONLY = ("telemetry_interval", "telemetry_lines")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jupiter-tui`; returns the exit code (see ExitCode)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_usage(parser, args)
    try:
        config = load_config(
            args.config, stages=args.stages, assignments=assignments(args), no_heads=args.no_heads
        )
        with other_machines(args, config) as hub:
            if args.batch is not None:
                from tui import batch

                return batch.main(args, config, hub)
            if args.telemetry_json:
                from tui import telemetry_json

                return telemetry_json.main(args, config, hub)
            return interactive(config, args.config, hub)
    except JupiterError as error:
        print(f"jupiter-tui: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The command line of both the workbench and `--batch`.

    A flag that only a batch has is None (or False) where it was not given.
    """
    parser = OneLineParser(
        prog="jupiter-tui",
        description="Chat with a model that runs as a chain of stages; "
        "with --batch, answer a file of prompts.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=Version)
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--config", "--config_file", metavar="FILE", help="default: ./config.json, else built in"
    )
    run.add_argument(
        "--stages",
        metavar="N,N,...",
        help="decoder layers per stage, such as 15,15; `auto` or `auto:N` plans them",
    )
    run.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="overrides a key of the config; may be repeated",
    )
    run.add_argument("--no-heads", action="store_true", help="decode without Medusa heads")
    run.add_argument(
        "--nnodes",
        metavar="N",
        type=positive,
        help="spread the stages over N machines, this one included; needs --listen",
    )
    run.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help="an address of this machine where the others join; the command for them is shown",
    )
    batch = parser.add_argument_group("batch")
    batch.add_argument(
        "--batch", metavar="INPUT", help="answer these JSONL prompts; - reads standard input"
    )
    batch.add_argument("-o", "--output", metavar="OUTPUT", help="default: - (standard output)")
    batch.add_argument("--resume", action="store_true", help="skip what OUTPUT already answers")
    batch.add_argument("--progress", choices=("auto", "json", "none"), help="default: auto")
    batch.add_argument(
        "--max-failures", metavar="N", type=positive, help="give up after N failed lines"
    )
    batch.add_argument(
        "--max-num-seqs", metavar="N", type=positive, help="decode N at a time; default: 16"
    )
    telemetry = parser.add_argument_group("telemetry")
    telemetry.add_argument(
        "--telemetry-json",
        action="store_true",
        help="without a screen: a JSON line of measured figures every second; alone, or with "
        "--batch INPUT -o FILE",
    )
    telemetry.add_argument(
        "--telemetry-interval", metavar="SECONDS", type=seconds, help="default: 1"
    )
    telemetry.add_argument(
        "--telemetry-lines", metavar="N", type=positive, help="end after N lines"
    )
    return parser


def check_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with exit code 2 and one line where flags or the terminal do not fit together."""
    if (args.nnodes or 1) > 1 and args.listen is None:
        parser.error("--nnodes needs --listen HOST:PORT, where the other machines join")
    if args.listen is not None and (args.nnodes or 1) == 1:
        parser.error("--listen needs --nnodes N, with N from 2")
    for name in TELEMETRY_ONLY:
        if getattr(args, name) is not None and not args.telemetry_json:
            parser.error(f"--{name.replace('_', '-')} needs --telemetry-json")
    if args.telemetry_json and args.batch is not None and args.output in (None, "-"):
        parser.error("--telemetry-json writes to standard output: give the batch an -o FILE")
    if args.batch is not None:
        args.output = args.output or "-"
        args.progress = args.progress or "auto"
        return
    for name in BATCH_ONLY:
        if getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} needs --batch INPUT")


def other_machines(
    args: argparse.Namespace, config: JupiterConfig
) -> AbstractContextManager[Hub | None]:
    """Where the other machines of `--nnodes` join; None for this one alone.

    Raises ConfigError.
    """
    if args.listen is None:
        return nullcontext()
    from engine.nodes.address import parse_address
    from engine.nodes.gathering import check_spread
    from engine.nodes.hub import LISTEN, Hub

    check_spread(config, args.nnodes)
    return Hub(parse_address(args.listen, LISTEN), args.nnodes)


def assignments(args: argparse.Namespace) -> list[str]:
    """The `key=value` texts to lay over the config file."""
    own = [] if args.max_num_seqs is None else [f"max_num_seqs={args.max_num_seqs}"]
    return [*args.set, *own]


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not '{text}'")
    return number


def seconds(text: str) -> float:
    """A span of at least a tenth of a second, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"must be seconds from 0.1 to 86400, not '{text}'")
    return value


def interactive(
    config: JupiterConfig, config_given: str | None = None, hub: Hub | None = None
) -> int:
    """Open the workbench on this terminal; returns the exit code.

    `hub` has the other machines, if there are any.
    """
    streams = (sys.stdin, sys.stdout, sys.stderr)
    # textual-serve shows the workbench in a browser: it names a driver of its own, and no terminal.
    if "TEXTUAL_DRIVER" not in os.environ and not all(stream.isatty() for stream in streams):
        print(
            "jupiter-tui: this is not a terminal; use --batch INPUT to answer prompts from a file",
            file=sys.stderr,
        )
        return ExitCode.BAD_INPUT
    from tui.terminal import run

    return run(config, config_given, hub=hub)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with code 2."""
        self.exit(ExitCode.BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


class Version(argparse.Action):
    """`--version`; the package's metadata is read only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"jupiter-tui {version('jupiter-workbench')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
