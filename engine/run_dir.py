"""The private folder of one launch: its sockets, its `run.json` and its rendezvous files.

A lock that the kernel releases tells the folder of a running client from what a killed one left.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import msgspec

from engine.errors import EngineError

PREFIX = "jupiter-"
LOCK = "lock"
RUN_FILE = "run.json"
ATTEMPTS = 3
# A Unix socket's path may have 108 bytes, the closing zero included.
MAX_SOCKET_PATH = 107


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What a launch tells its workers, for one epoch of it."""

    epoch: int
    """Stamped on every message; another one begins when the stages meet again after a loss."""
    events: str
    commands: str
    """Addresses of the client's sockets."""
    client_pid: int
    model_folder: str
    log_dir: str
    store: str
    """File of the process group's FileStore."""
    config: dict[str, object]
    workers: tuple[int, ...]
    """Of each rank, the number of workers that were wanted for it so far."""
    first_rank: int = 0
    """Of those on this machine."""
    exchange: str = ""
    """Where the stages of several machines find each other, in the place of the FileStore."""


def read_run(run_dir: Path) -> Run:
    """What the workers of a run folder are told now. Raises OSError, msgspec.DecodeError."""
    return msgspec.json.decode((run_dir / RUN_FILE).read_bytes(), type=Run)


class RunDir:
    """A folder for one launch, mode 0700, in XDG_RUNTIME_DIR or else the temporary folder.

    Raises EngineError when no folder with a path short enough for a socket can be made.
    """

    def __init__(self) -> None:
        base = _base()
        sweep(base)
        self.path, self._lock = _make(base)

    @property
    def events(self) -> str:
        """Address of the client's PULL socket."""
        return f"ipc://{self.path / 'events'}"

    @property
    def commands(self) -> str:
        """Address of the client's PUB socket."""
        return f"ipc://{self.path / 'commands'}"

    @property
    def exchange(self) -> str:
        """Address of the socket at which stages ask for each other."""
        return f"ipc://{self.path / 'exchange'}"

    @property
    def run_file(self) -> Path:
        """What the workers are told."""
        return self.path / RUN_FILE

    def store(self, epoch: int) -> Path:
        """File of an epoch's FileStore: what a group before has left there would confuse it."""
        return self.path / f"store-{epoch}"

    @property
    def rendezvous(self) -> Path:
        """File of torchrun's own rendezvous."""
        return self.path / "rendezvous"

    def write_run(self, run: Run) -> None:
        """Write what the workers are told, mode 0600; in one move, as they may be reading."""
        new = self.path / f"{RUN_FILE}.new"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.encode(run))
        new.replace(self.run_file)

    def remove(self) -> None:
        """Remove the folder and what is in it; idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def sweep(base: Path) -> None:
    """Remove the run folders in `base` whose clients are gone."""
    for lock in base.glob(f"{PREFIX}*/{LOCK}"):
        try:
            fd = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # another user's, or just being removed
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its client lives
        else:
            shutil.rmtree(lock.parent, ignore_errors=True)
        finally:
            os.close(fd)


def _base() -> Path:
    candidates = [os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"]
    for candidate in candidates:
        longest = f"{candidate}/{PREFIX}{'x' * 8}/commands"
        if (
            candidate
            and os.access(candidate, os.W_OK | os.X_OK)
            and len(os.fsencode(longest)) <= MAX_SOCKET_PATH
        ):
            return Path(candidate)
    raise EngineError(
        f"no writable folder with a path of at most {MAX_SOCKET_PATH - 26} bytes for sockets; "
        "set TMPDIR to one"
    )


def _make(base: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    problem: OSError | None = None
    for _ in range(ATTEMPTS):
        try:
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))  # mode 0700
            fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (path / LOCK).stat()
        except OSError as error:  # another client's sweep may have seen it before we had the lock
            problem = error
        else:
            return path, fd
    raise EngineError(f"{base}: no run folder can be made: {problem}")
