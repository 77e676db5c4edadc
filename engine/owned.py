"""Run a Python module in a process that ends with its client: `-m engine.owned PID MODULE ARGS`.

torchrun and `jupiter fetch` are started so. They have no watch of their own, and when the client
dies of `kill -9` nobody is left to stop them.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

from engine.owners import exit_now, watch_owners


def main() -> None:
    """Run the module named on the command line as `python -m` would."""
    client_pid, module = int(sys.argv[1]), sys.argv[2]
    watch_owners(client_pid, _end_with_helpers)
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with_helpers(reason: str) -> None:
    """End this process, and with it what it has started in its own process group."""
    if os.getpgrp() == os.getpid():
        os.write(2, f"jupiter process {os.getpid()}: {reason}; killing its group\n".encode())
        os.killpg(0, signal.SIGKILL)
    exit_now(reason)


if __name__ == "__main__":
    main()
