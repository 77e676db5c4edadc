"""`python -m engine.training.attended WORDS`: `jupiter WORDS`, tied to whoever started it.

stdin is the tie. When it ends, however the other side has ended, the run stops as on SIGTERM: with
a checkpoint. The line `leave` unties it first, and the run goes on alone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from engine.cli.main import main as jupiter

LEAVE = b"leave\n"


def main() -> int:
    """Run the command; returns its exit code."""
    tie = os.dup(sys.stdin.fileno())  # a copy that the ranks do not inherit
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)
    threading.Thread(target=_hold, args=(tie,), name="jupiter-tie", daemon=True).start()
    return jupiter(sys.argv[1:])


def _hold(tie: int) -> None:
    """Wait until the tie ends; ends the run unless it was told to go on."""
    said = b""
    while chunk := os.read(tie, 64):
        said += chunk
    if LEAVE not in said:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
