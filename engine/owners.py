"""The watch that ends a process when the client, or the launcher between the two, is gone.

Neither of the usual means is enough: parent-death signals fire when the spawning thread ends, and
torchrun gives every worker a session of its own, out of reach of a signal to its group.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import psutil

from engine.errors import ExitCode
from engine.processes import ProcessHandle, first_gone


def exit_now(reason: str) -> None:
    """Leave `reason` in the log and end this process, whatever its other threads are doing."""
    os.write(2, f"jupiter process {os.getpid()}: {reason}; exiting\n".encode())
    os._exit(ExitCode.ENGINE_FAILED)


def watch_owners(client_pid: int, on_gone: Callable[[str], None] = exit_now) -> None:
    """Call `on_gone(reason)`, once and in a daemon thread, when an owner of this process is gone.

    The owners are the client, process `client_pid`, and the parent process (torchrun). The client
    has to be an ancestor of this process: one that is not any more had died before the watch
    began, even where its pid is in use again.
    """
    threading.Thread(
        target=lambda: on_gone(_wait_for_loss(client_pid, os.getppid())),
        name="jupiter-owners",
        daemon=True,
    ).start()


def _wait_for_loss(client_pid: int, parent_pid: int) -> str:
    """Block until one of the two has ended; returns what happened in words."""
    owners = {parent_pid: "the launcher", client_pid: "the client"}
    try:
        handles = [ProcessHandle(pid) for pid in owners]
        ancestors = [process.pid for process in psutil.Process().parents()]
    except (OSError, psutil.Error):
        return "the client or the launcher is gone"
    # Looked up after the handles were opened: from here on a loss shows on them.
    if client_pid not in ancestors:
        return f"the client (process {client_pid}) is gone"
    gone = first_gone(handles)
    assert gone is not None  # without a timeout it waits
    pid = handles[gone].pid
    return f"{owners[pid]} (process {pid}) is gone"
