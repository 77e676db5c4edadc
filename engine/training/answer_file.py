"""The file that self-distillation writes: one whole line per conversation, whatever happens."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from engine.errors import ExitCode, JupiterError
from engine.protocol import Message

KEYS = ("id", "messages", "finish_reason", "generated_by")
# Readers that split at any Unicode line end would tear a line at these.
LINE_ENDS = {"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}


class AnswerFileError(JupiterError):
    """The file cannot be gone on with; it stays as it was."""


class AnswersLostError(JupiterError):
    """Writing failed, as on a full disk; the lines before are whole."""

    exit_code = ExitCode.ENGINE_FAILED


class AnswerFile:
    """Conversations that are done; a context manager.

    Opening an old file takes out a last line that is torn and reads the others: `done` says what
    is in it.

    Args:
        path: made where it does not exist.
        made_by: how the answers are made; an old file has to say the same.

    Raises:
        AnswerFileError: it holds something else, or another run is writing it.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        self.path = path
        self.made_by = dict(made_by)
        self.done: dict[str, tuple[str, ...]] = {}
        """What was asked, the user's messages, by id."""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise AnswerFileError(f"{path}: {error.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise AnswerFileError(
                    f"{path}: is no regular file, which alone can be gone on with"
                )
            self._lock()
            self._read()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the lines are the system's to keep already
            os.fsync(self._fd)
        os.close(self._fd)

    def write(self, id: str, messages: Sequence[Message], finish_reason: str, **more: Any) -> None:
        """Append one conversation; the file has all of its line or nothing.

        more: further keys of the line.

        Raises AnswersLostError.
        """
        row = {
            "id": id,
            **more,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "finish_reason": finish_reason,
            "generated_by": self.made_by,
        }
        text = json.dumps(row, ensure_ascii=False)
        for end, escape in LINE_ENDS.items():
            text = text.replace(end, escape)
        data = text.encode() + b"\n"
        size = os.fstat(self._fd).st_size
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, size)
            raise AnswersLostError(f"{self.path}: cannot write: {error.strerror}") from None

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AnswerFileError(f"{self.path}: another run is writing it") from None
        except OSError:
            return  # a file system without locks

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        torn = data[whole:]
        # After a power cut the end of a file may be zeros.
        if torn and not torn.startswith(b"{") and torn.strip(b"\0"):
            raise self._stranger(data.count(b"\n") + 1)
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            self._note(number, line)
        if torn:
            os.ftruncate(self._fd, whole)

    def _note(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            name, made_by = row["id"], row["generated_by"]
            asked = tuple(m["content"] for m in row["messages"] if m["role"] == "user")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._stranger(number) from None
        if made_by != self.made_by:
            raise AnswerFileError(
                f"{self.path}: line {number}: was made by {_told(made_by)}, not by "
                f"{_told(self.made_by)}; name a new output file"
            )
        self.done[str(name)] = asked

    def _stranger(self, number: int) -> AnswerFileError:
        return AnswerFileError(
            f"{self.path}: line {number}: not a line that this command writes; name another file"
        )


def _told(made_by: Any) -> str:
    return json.dumps(made_by)
