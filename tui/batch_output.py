"""Where a batch's answers go: a file or standard output, never a torn line, never a doubled one."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from engine.errors import ExitCode, JupiterError
from tui.batch_lines import BatchOutputError, OldLine, read_old_lines

FINISH_LINE_S = 2.0
"""How long a reader that has stalled in the middle of a line is waited for at the end."""


class OutputLostError(JupiterError):
    """Writing an answer failed, as on a full disk; those written before are whole."""

    exit_code = ExitCode.ENGINE_FAILED


class ReaderGoneError(Exception):
    """Whoever read the answers from a pipe reads no more (as in `| head`)."""


class BatchOutput:
    """The output of one batch; a context manager.

    Making one checks that it can be used and changes nothing; `begin` makes it ready to write.

    Args:
        output: path, or None or "-" for standard output.
        source: path of the input, or "-" for standard input.
        resume: go on with the answers that the file holds.

    Raises:
        BatchOutputError: it is the input itself, exists without `resume`, or has no folder.
    """

    def __init__(self, output: str | None, source: str, *, resume: bool) -> None:
        self.is_stdout = output in (None, "-")
        self.name = "standard output" if self.is_stdout else str(output)
        self.old_lines: list[OldLine] = []
        self._old_size = 0
        self._fd: int | None = None
        self._old_fd: int | None = None
        self._turn = asyncio.Lock()
        self._path = Path(self.name)
        try:
            if not self.is_stdout:
                self._check_path(source, resume)
            elif resume:
                raise BatchOutputError("--resume needs an output file: name it with -o FILE")
            else:
                self._take_stdout(source)
        except BatchOutputError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_stdout(self, source: str) -> None:
        """Keep standard output for answers alone: whatever else is printed goes to stderr."""
        try:
            self._refuse_input(os.fstat(1), source)
            self._fd = os.dup(1)
        except OSError as error:
            raise BatchOutputError(f"{self.name}: {error.strerror}") from None
        with contextlib.suppress(OSError):  # stderr may be closed
            os.dup2(2, 1)

    def _check_path(self, source: str, resume: bool) -> None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            found = None
        except OSError as error:
            raise BatchOutputError(f"{self.name}: {error.strerror}") from None
        if found is None or stat.S_ISREG(found.st_mode):
            # A symbolic link stays one: what it points to is written.
            self._path = self._path.resolve()
        if found is None:
            folder = self._path.parent
            if not folder.is_dir():
                raise BatchOutputError(f"{self.name}: no such folder: {folder}")
            if not os.access(folder, os.W_OK):
                raise BatchOutputError(f"{self.name}: cannot write in {folder}")
            return
        if stat.S_ISDIR(found.st_mode):
            raise BatchOutputError(f"{self.name}: is a folder; name a file")
        self._refuse_input(found, source)
        if not stat.S_ISREG(found.st_mode):  # a named pipe, /dev/null
            if resume:
                raise BatchOutputError(f"{self.name}: --resume needs a regular file")
        elif not resume:
            hint = "add --resume to go on with it, or name another file"
            raise BatchOutputError(f"{self.name}: exists; {hint}")
        else:
            self._read_old()

    def _refuse_input(self, output: os.stat_result, source: str) -> None:
        try:
            given = os.fstat(0) if source == "-" else Path(source).stat()
        except OSError:
            return  # reading it will say why
        if stat.S_ISREG(given.st_mode) and os.path.samestat(given, output):
            raise BatchOutputError(f"{self.name}: is the input itself; name another output file")

    def _read_old(self) -> None:
        try:
            self._old_fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            self._lock(self._old_fd)
            data = self._path.read_bytes()
        except OSError as error:
            raise BatchOutputError(f"{self.name}: {error.strerror}") from None
        self.old_lines = read_old_lines(self.name, data)
        self._old_size = len(data)

    def _lock(self, fd: int) -> None:
        """Two runs that write one file would answer everything twice: refuse the second."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchOutputError(f"{self.name}: another run is writing it") from None
        except OSError:
            return  # a file system without locks
        if not os.path.samestat(os.fstat(fd), self._path.stat()):
            raise BatchOutputError(f"{self.name}: another run has just replaced it; try again")

    def begin(self, keep: Iterable[OldLine] = ()) -> None:
        """Make the file ready to append to, holding the lines of `keep` and no other.

        Raises BatchOutputError or OutputLostError; an old file then stays as it was.
        """
        if self.is_stdout:
            return
        try:
            if self._old_fd is None:
                self._open_new()
                return
            data = b"".join(line.raw for line in keep)
            if len(data) != self._old_size:
                self._fd = self._replace(data)
            else:
                self._fd, self._old_fd = self._old_fd, None
        except OSError as error:
            raise self._lost(error) from None

    def _open_new(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        if self._path.exists():
            if self._path.is_file():
                raise BatchOutputError(f"{self.name}: another run has just made it")
            # A pipe that nobody reads would block here for good.
            self._fd = os.open(self._path, flags | os.O_NONBLOCK)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, os.O_APPEND)
        else:
            self._fd = os.open(self._path, flags | os.O_CREAT | os.O_EXCL, 0o666)
            self._lock(self._fd)

    def _replace(self, data: bytes) -> int:
        """Put a file with `data` in the place of the old one, at once; its descriptor."""
        assert self._old_fd is not None
        fd, name = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        try:
            os.fchmod(fd, stat.S_IMODE(os.fstat(self._old_fd).st_mode))
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
            _write_all(fd, data)
            os.fsync(fd)
            Path(name).replace(self._path)
        except BaseException:
            os.close(fd)
            Path(name).unlink(missing_ok=True)
            raise
        return fd

    async def write(self, line: bytes) -> None:
        """Append one whole line; a file has it when this returns.

        A reader that is slow (`| less`) is waited for without blocking the event loop, which has
        heartbeats to send.

        Raises:
            ReaderGoneError: nobody reads the pipe any more.
            OutputLostError: it could not be written; no part of it is left in the file.
        """
        assert self._fd is not None
        before = os.fstat(self._fd)
        try:
            if stat.S_ISREG(before.st_mode) or not _can_wait(self._fd):
                _write_all(self._fd, line)
            else:
                await self._feed(line)
        except BrokenPipeError:
            raise ReaderGoneError from None
        except OSError as error:
            if stat.S_ISREG(before.st_mode):
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, before.st_size)
            raise self._lost(error) from None

    async def _feed(self, line: bytes) -> None:
        feeding = asyncio.ensure_future(self._feed_parts(line))
        try:
            await asyncio.shield(feeding)
        except asyncio.CancelledError:
            done, _ = await asyncio.wait([feeding], timeout=FINISH_LINE_S)
            for task in done:
                task.exception()  # seen, so that asyncio does not complain of it
            raise

    async def _feed_parts(self, line: bytes) -> None:
        assert self._fd is not None
        async with self._turn:
            while line:
                await _writable(self._fd)
                # A pipe that can be written at all takes this much without blocking.
                line = line[os.write(self._fd, line[: select.PIPE_BUF]) :]

    def sync(self) -> None:
        """Have the disk keep what was written. Raises OutputLostError."""
        if self._fd is None:
            return
        try:
            os.fsync(self._fd)
        except OSError as error:
            # Pipes and terminals have nothing to keep.
            if error.errno not in (errno.EINVAL, errno.EROFS, errno.ENOTSUP):
                raise self._lost(error) from None

    def close(self) -> None:
        """Give back the descriptors; standard output is everyone's again."""
        if self.is_stdout and self._fd is not None:
            os.dup2(self._fd, 1)
        for fd in (self._fd, self._old_fd):
            if fd is not None:
                os.close(fd)
        self._fd = self._old_fd = None

    def _lost(self, error: OSError) -> OutputLostError:
        why = "nobody reads this pipe" if error.errno == errno.ENXIO else error.strerror
        return OutputLostError(f"{self.name}: cannot write: {why}")


def _write_all(fd: int, data: bytes) -> None:
    """One `write` as a rule; a disk that fills up takes a part and then says why."""
    while data:
        data = data[os.write(fd, data) :]


def _can_wait(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)


async def _writable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(fd)
