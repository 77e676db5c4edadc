"""The private folder of one launch: its sockets, its `run.json` and its rendezvous files.

A lock that the kernel releases tells the folder of a running client from what a killed one left.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from engine.errors import EngineError

PREFIX = "jupiter-"
LOCK = "lock"
ATTEMPTS = 3
# A Unix socket's path may have 108 bytes, the closing zero included.
MAX_SOCKET_PATH = 107


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
    def run_file(self) -> Path:
        """What the workers are told."""
        return self.path / "run.json"

    @property
    def store(self) -> Path:
        """File of the process group's FileStore."""
        return self.path / "store"

    @property
    def rendezvous(self) -> Path:
        """File of torchrun's own rendezvous."""
        return self.path / "rendezvous"

    def write_private(self, path: Path, text: str) -> None:
        """Write `text` to a file of mode 0600 in the folder."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)

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
