"""What may happen to a live process: killed, stopped, held up, cut off, out of disk space."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import socket
from contextlib import suppress
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

import psutil

PIDFD_GETFD = 438
"""The system call's number, the same on all machines that have it."""


def kill(pid: int) -> None:
    """As the kernel does when memory has run out."""
    os.kill(pid, SIGKILL)


def stop(pid: int) -> None:
    """The process is there and does nothing any more."""
    os.kill(pid, SIGSTOP)


async def delay(pid: int, seconds: float) -> None:
    """The process stands still for a while."""
    with suppress(ProcessLookupError):
        os.kill(pid, SIGSTOP)
        await asyncio.sleep(seconds)
        os.kill(pid, SIGCONT)


def cut_links(pid: int) -> int:
    """Close the TCP connections of a process under its hands; returns how many.

    The descriptors are taken from the process itself, which its ancestors may do on Linux.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    cut = 0
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            fd = libc.syscall(PIDFD_GETFD, process, int(entry.name), 0)
            if fd < 0:
                continue
            with suppress(OSError), socket.socket(fileno=fd) as taken:
                if taken.family in (socket.AF_INET, socket.AF_INET6):
                    taken.getpeername()  # not one that only listens
                    taken.shutdown(socket.SHUT_RDWR)
                    cut += 1
    finally:
        os.close(process)
    return cut


def fill_disk(pid: int) -> None:
    """From now on no file that the process writes may grow."""
    psutil.Process(pid).rlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
