"""What torchrun starts for a rank: a process that has torch loaded and keeps a worker alive.

The worker itself is a fork of it. When it ends, another is there at once: importing torch, more
than half of a start, is done already, and torchrun and the other stages need not know.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from engine.errors import ExitCode
from engine.logs import note_exit
from engine.processes import ProcessHandle, first_gone
from engine.run_dir import Run, read_run

POLL_S = 0.02
CAN_FORK = hasattr(os, "pidfd_open")
"""Linux: elsewhere torch does not survive a fork."""


def keep(run_dir: Path, work: Callable[[Run], int]) -> int:
    """Have `work` done in a fork, in another when the client wants one, until it ends with 0.

    This process starts no thread before it forks. It ends when the client or torchrun does.
    Returns its exit code.
    """
    run = read_run(run_dir)
    rank = run.first_rank + int(os.environ["RANK"])
    try:
        owners = [ProcessHandle(run.client_pid), ProcessHandle(os.getppid())]
        if run.client_pid not in [process.pid for process in psutil.Process().parents()]:
            return ExitCode.ENGINE_FAILED
    except (OSError, psutil.Error):
        return ExitCode.ENGINE_FAILED
    with suppress(OSError):  # the run folder is gone, and the client with it
        return _keep(run_dir, run, rank, work, owners)
    return ExitCode.ENGINE_FAILED


def _keep(
    run_dir: Path, run: Run, rank: int, work: Callable[[Run], int], owners: list[ProcessHandle]
) -> int:
    while True:
        pid = os.fork()
        if pid == 0:
            _leave(work, run)
        code = _follow(pid, owners)
        if code is None:
            return ExitCode.ENGINE_FAILED
        if code == ExitCode.OK:
            return ExitCode.OK
        number = run.workers[rank]
        run = read_run(run_dir)  # the worker may have lived through other epochs
        note_exit(run.log_dir, run.epoch, rank, pid, code)
        while run.workers[rank] == number:
            if first_gone(owners, POLL_S) is not None:
                return ExitCode.ENGINE_FAILED
            run = read_run(run_dir)


def _leave(work: Callable[[Run], int], run: Run) -> None:
    """In the fork: work, then straight out, as a receive may still wait in a thread."""
    code: int = ExitCode.ENGINE_FAILED
    try:
        code = work(run)
    finally:
        os._exit(code)


def _follow(pid: int, owners: list[ProcessHandle]) -> int | None:
    """Wait for the worker's end; its exit code (negative: a signal), None where an owner went."""
    worker = ProcessHandle(pid)  # not reaped yet, so the pid is its own
    try:
        if first_gone([worker, *owners]) != 0:
            worker.signal(signal.SIGKILL)
            return None
    finally:
        worker.close()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
