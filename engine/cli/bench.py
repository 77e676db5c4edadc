"""`jupiter bench`: figures of this machine, each the last line of a command, as JSON."""

from __future__ import annotations

import importlib
import os
import sys

from engine.errors import ConfigError

BENCHES = {
    "batch": "engine.bench.batch",
    "decode": "engine.bench.decode",
    "faults": "engine.bench.faults.command",
    "outline": "engine.bench.outline",
    "prefill": "engine.bench.prefill",
    "network": "engine.bench.network.bench",
    "quality": "engine.bench.quality",
    "soak": "engine.bench.soak",
    "step": "engine.bench.step",
    "train": "engine.bench.train",
}
# A program of its own: the engine imports nothing of the terminal.
PROGRAMS = {"ui": "tui.bench_ui"}


def main(words: list[str]) -> int:
    """Run the bench that the first word names; the others are its own. Returns the exit code."""
    name = words[0] if words else ""
    if name in PROGRAMS:
        # In the place of this process, so that a signal to it ends the bench.
        os.execv(sys.executable, [sys.executable, "-m", PROGRAMS[name], *words[1:]])
    if name not in BENCHES:
        raise ConfigError(f"name what to measure: {', '.join(sorted({**BENCHES, **PROGRAMS}))}")
    return int(importlib.import_module(BENCHES[name]).main(words[1:]))
