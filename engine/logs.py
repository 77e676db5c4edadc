"""Logs of a launch: one folder, in it torchrun's own log and a folder per rank."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

from engine.errors import EngineError
from engine.paths import make_private, state_dir

KEEP_LAUNCHES = 20
TAIL_BYTES = 16_384
EXITS = "exits.log"
"""Of a launch: a line for each worker that failed."""
# Two forms in which torchrun tells how a worker ended: at once, and in its closing summary.
_FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")
_SUMMARY = re.compile(
    r"rank\s*: (\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*: (-?\d+) \(pid: (\d+)\)"
)


def new_log_dir() -> Path:
    """Make the log folder of a launch, mode 0700, and remove those of long ago.

    The last KEEP_LAUNCHES are kept, this one included. Raises EngineError when it cannot be made.
    """
    root = state_dir() / "logs"
    now = time.time()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    path = root / f"{stamp}.{int(now * 1000) % 1000:03}-{os.getpid()}"
    try:
        make_private(root)
        path.mkdir(mode=0o700)
    except OSError as error:
        raise EngineError(
            f"{root}: no folder for logs can be made ({error.strerror}); set JUPITER_STATE_DIR"
        ) from None
    launches = sorted(child for child in root.iterdir() if child.is_dir())
    for old in launches[:-KEEP_LAUNCHES]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def torchrun_log(log_dir: Path) -> Path:
    """torchrun's own output."""
    return log_dir / "torchrun.log"


def rank_log(log_dir: Path, rank: int) -> Path | None:
    """The file with a rank's stderr, or None before torchrun has made it."""
    return next(iter(log_dir.glob(f"*/attempt_0/{rank}/stderr.log")), None)


def node_log(log_dir: Path, rank: int) -> Path:
    """Where the log of a rank on another machine is gathered; `rank_log` finds it."""
    return log_dir / "nodes" / "attempt_0" / str(rank) / "stderr.log"


def tail(path: Path | None, lines: int = 10) -> list[str]:
    """The last lines of a log that are not blank; none where there is no log."""
    try:
        with path.open("rb") if path else open(os.devnull, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]


def with_last_lines(what: str, log: Path | None) -> str:
    """`what`, and below it the end of a log."""
    lines = tail(log)
    if not lines:
        return f"{what}; its log is empty: {log}" if log else what
    return "\n".join([f"{what}; the end of {log}:", *(f"  {line}" for line in lines)])


def note_exit(log_dir: str, epoch: int, rank: int, pid: int, code: int) -> None:
    """Note how a worker of an epoch ended, for `exit_codes`; in one write, as all ranks do it."""
    with suppress(OSError):  # a full disk: the end itself is seen all the same
        fd = os.open(Path(log_dir, EXITS), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(fd, f"{epoch} {rank} {pid} {code}\n".encode())
        finally:
            os.close(fd)


def exit_codes(
    log_dir: Path, epoch: int | None = None, without: Container[int] = ()
) -> dict[int, tuple[int, int]]:
    """How the workers of an epoch failed: rank -> (pid, exit code), in the order of their ends.

    A negative exit code is the signal that ended the worker, negated. Where nothing was noted,
    it is what torchrun wrote about the processes that it started; its first rank is the one that
    it took for the cause. Processes in `without` are passed over.
    """
    noted: dict[int, tuple[int, int]] = {}
    with suppress(OSError, ValueError):
        for line in (log_dir / EXITS).read_text(encoding="ascii").splitlines():
            of, rank, pid, code = map(int, line.split())
            if of == epoch and pid not in without:
                noted.setdefault(rank, (pid, code))
    return noted or _torchruns(log_dir)


def _torchruns(log_dir: Path) -> dict[int, tuple[int, int]]:
    try:
        text = torchrun_log(log_dir).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    codes = {int(rank): (int(pid), int(code)) for code, rank, pid in _FAILED.findall(text)}
    for rank, code, pid in _SUMMARY.findall(text):
        codes.setdefault(int(rank), (int(pid), int(code)))
    return codes


def describe_exit(code: int) -> str:
    """An exit code in words: "ended with exit code 3", "was killed by SIGKILL"."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (out of memory, or by hand)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
