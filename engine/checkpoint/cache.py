"""Folders of the cache that are made once, whole or not at all, by one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.checkpoint.child import run_module
from engine.errors import CheckpointError

Progress = Callable[[str], None]


class Workshop:
    """A private folder to make something in, and the lock that is held meanwhile."""

    def __init__(self, folder: Path, lock: int, progress: Progress) -> None:
        self.folder = folder
        self.result = folder / "result"
        self.progress = progress
        self._lock = lock

    def run(self, module: str, *words: str) -> None:
        """Run `python -m module words`; each line of its stdout is progress.

        Raises:
            CheckpointError: it failed; the message is the line of stderr that says most.
        """
        # Should this process be killed, the lock is held until its helpers have ended too, so
        # that nobody else works in the same place as they do.
        run_module(module, words, self.progress, keep_open=[self._lock])


def make_once(folder: Path, build: Callable[[Workshop], None], progress: Progress) -> Path:
    """Return `folder`; if it is not there, `build(workshop)` makes it as `workshop.result`.

    It appears by one rename, so it is there whole or not at all. Another process that wants the
    same folder waits for this one. What a killed process left behind is cleared away.

    Raises:
        CheckpointError: `build` failed, or the disk did; nothing is left of it.
    """
    if folder.is_dir():
        return folder
    try:
        with _locked(folder, progress) as lock:
            if folder.is_dir():
                return folder
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                workshop = Workshop(partial, lock, progress)
                workshop.result.mkdir(parents=True)
                build(workshop)
                workshop.result.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: {error.strerror or error}") from None
    return folder


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[int]:
    """Hold the lock for making `folder`; yields its descriptor."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"another process is making {folder.name}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def identity(files: Iterable[Path]) -> str:
    """A short name for these files as they are now: another path, size or time, another name."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]
