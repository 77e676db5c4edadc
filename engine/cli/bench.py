"""`jupiter bench`: figures of this machine, each the last line of a command, as JSON."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from engine.errors import ConfigError

# Each is a program of its own: the engine imports nothing of the terminal.
BENCHES = {"ui": "tui.bench_ui"}


def main(words: list[str]) -> NoReturn:
    """Run the bench that the first word names; the others are its own."""
    if not words or words[0] not in BENCHES:
        raise ConfigError(f"name what to measure: {', '.join(BENCHES)}")
    # In the place of this process, so that a signal to it ends the bench.
    os.execv(sys.executable, [sys.executable, "-m", BENCHES[words[0]], *words[1:]])
