"""Follows a log file as it grows: whole lines, made harmless to a terminal. Free of Textual."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tui.text import log_text

OPEN_BYTES = 2 << 20
"""Of a longer file only so much of the end is read."""
READ_BYTES = 1 << 18
"""Read at most at a time, so that a fast writer does not hold up the screen."""
LINE_LENGTH = 10_000
"""A longer line is shown as several."""


@dataclass(frozen=True)
class Change:
    """What a look at the file brought."""

    lines: tuple[str, ...] = ()
    """New whole lines."""
    partial: str = ""
    """The line that is being written, as far as it is."""
    restarted: bool = False
    """Another file, or the same one cut short: what was read before is void."""
    more: bool = False
    """There is more to be read right now."""


class LogFile:
    """The log that `find` names at the moment; the next launch has another one.

    Every file that does not exist or cannot be read is treated as one that is not there yet.
    """

    def __init__(self, find: Callable[[], Path | None]) -> None:
        self._find = find
        self._identity: tuple[int, int] | None = None
        self._begin()
        self.path: Path | None = None
        """The file that is followed."""
        self.problem = ""
        """Why it cannot be read, if it cannot."""

    def _begin(self, at: int = 0) -> None:
        self._at = at
        self.skipped = at
        """Bytes at the beginning that were left out."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def poll(self) -> Change:
        """Read on; never blocks for long, never raises."""
        path = self._find() or self.path
        self.problem = ""
        if path is None:
            return Change()
        try:
            with path.open("rb") as file:
                return self._read(path, file.fileno())
        except OSError as error:
            self.path = path
            self.problem = error.strerror or str(error)
            return Change(partial=log_text(self._rest))

    def _read(self, path: Path, fd: int) -> Change:
        found = os.fstat(fd)
        identity, restarted = (found.st_dev, found.st_ino), False
        if identity != self._identity or found.st_size < self._at:
            restarted = self._identity is not None
            self._begin(max(0, found.st_size - OPEN_BYTES))
            self._identity = identity
        self.path = path
        data = os.pread(fd, READ_BYTES, self._at)
        cut = self.skipped > 0 and self._at == self.skipped
        self._at += len(data)
        text = self._decoder.decode(data)
        if cut:  # begin with a whole line
            text = text.partition("\n")[2]
        # A carriage return alone overwrites on a terminal; here nothing is hidden.
        text = (self._rest + text).replace("\r\n", "\n").replace("\r", "\n")
        *lines, self._rest = text.split("\n")
        if len(self._rest) >= LINE_LENGTH:
            lines, self._rest = [*lines, self._rest], ""
        shown = tuple(piece for line in lines for piece in _pieces(log_text(line)))
        more = len(data) == READ_BYTES
        return Change(shown, log_text(self._rest).expandtabs(), restarted, more)


def _pieces(line: str) -> list[str]:
    line = line.expandtabs()
    starts = range(0, max(1, len(line)), LINE_LENGTH)
    return [line[start : start + LINE_LENGTH] for start in starts]
