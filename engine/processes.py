"""Processes held by a handle, so that a pid in use again is never watched or killed for another.

On Linux the handle is a pidfd; elsewhere it is psutil's pair of pid and creation time.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable, Sequence

import psutil

HAVE_PIDFD = hasattr(os, "pidfd_open") and hasattr(signal, "pidfd_send_signal")
POLL_S = 0.2
"""How often a process is looked at where there are no pidfds."""


class ProcessHandle:
    """One running process.

    Raises ProcessLookupError when there is no process `pid`.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fd: int | None = None
        """A descriptor that becomes readable when the process ends; None without pidfds."""
        if HAVE_PIDFD:
            self.fd = os.pidfd_open(pid)
        else:
            try:
                self._process = psutil.Process(pid)
            except psutil.NoSuchProcess:
                raise ProcessLookupError(pid) from None

    def gone(self) -> bool:
        """Whether the process has ended; one that only waits to be reaped has."""
        if self.fd is not None:
            return bool(_readable([self.fd], 0.0))
        try:
            return not self._process.is_running() or self._process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when the process has ended."""
        try:
            if self.fd is not None:
                signal.pidfd_send_signal(self.fd, number)
            else:
                self._process.send_signal(number)
        except (ProcessLookupError, PermissionError, psutil.Error):
            pass

    def close(self) -> None:
        """Give the descriptor back; the handle is of no use afterwards. Idempotent: a number that
        was closed twice would be somebody else's the second time.
        """
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)


def first_gone(handles: Sequence[ProcessHandle], timeout_s: float | None = None) -> int | None:
    """Wait until one of the processes has ended; its index, or None after `timeout_s` seconds."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        for index, handle in enumerate(handles):
            if handle.gone():
                return index
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return None
        if HAVE_PIDFD:
            _readable([handle.fd for handle in handles if handle.fd is not None], left)
        else:
            time.sleep(POLL_S if left is None else min(left, POLL_S))


def wait_all_gone(handles: Iterable[ProcessHandle], timeout_s: float) -> bool:
    """Wait until all the processes have ended; False when `timeout_s` seconds were not enough."""
    deadline = time.monotonic() + timeout_s
    return all(first_gone([h], max(0.0, deadline - time.monotonic())) is not None for h in handles)


def descendants(pid: int) -> list[int]:
    """Pids of all living processes below `pid`."""
    try:
        return [process.pid for process in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def _readable(fds: Sequence[int], timeout_s: float | None) -> list[int]:
    poller = select.poll()  # not select(): it fails above descriptor 1023
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return [fd for fd, _ in poller.poll(None if timeout_s is None else timeout_s * 1000)]
