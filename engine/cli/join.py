"""`jupiter join HOST:PORT`: this machine computes stages for a `jupiter-tui --nnodes` elsewhere."""

from __future__ import annotations

import argparse
import getpass
import os
import re
import signal
import socket
import sys
from types import FrameType

from engine.errors import ConfigError
from engine.nodes.address import interface_towards, parse_address
from engine.nodes.token import JoinToken, parse_token

TOKEN = "JUPITER_JOIN_TOKEN"
PATIENCE_S = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jupiter join`."""
    parser.add_argument("address", metavar="HOST:PORT", help="where the first machine listens")
    parser.add_argument(
        "--token",
        metavar="TOKEN",
        help=f"as the first machine shows it; or in {TOKEN}, else it is asked for",
    )
    parser.add_argument("--name", default=socket.gethostname(), help="default: the host's name")
    parser.add_argument(
        "--receive",
        action="store_true",
        help="have model and heads sent, whatever is on this machine",
    )
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=float,
        default=PATIENCE_S,
        help=f"how long to wait for the first machine; default: {PATIENCE_S:g}",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until the first machine's run is over."""
    from engine.nodes.agent import Agent

    address = parse_address(args.address, "HOST:PORT")
    token = _token(args.token)
    interface_towards(address)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    agent = Agent(
        address,
        token,
        re.sub(r"[^\w.-]", "_", args.name)[:40] or "unnamed",
        receive=args.receive,
        patience_s=args.wait,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return agent.run()


def _token(given: str | None) -> JoinToken:
    text = given or os.environ.pop(TOKEN, "")  # workers need not know it
    if not text:
        if not sys.stdin.isatty():
            raise ConfigError(f"no join token: give --token, or set {TOKEN}")
        text = getpass.getpass("join token: ")
    return parse_token(text)


def _stop(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
