"""A program in a terminal of its own: what it shows, what it is sent, what it leaves behind.

pexpect holds the pseudo-terminal, pyte plays the screen. Waiting is for what is to be seen; a wait
in vain fails with the screen as it was.
"""

from __future__ import annotations

import os
import sys
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import pexpect
import psutil
import pyte

from engine.processes import ProcessHandle, wait_all_gone

JUPITER_TUI = str(Path(sys.executable).with_name("jupiter-tui"))
ROOT = Path(__file__).parents[2]
ENTER, ESCAPE, CTRL_J, CTRL_N, CTRL_Q, CTRL_R = "\r", "\x1b", "\n", "\x0e", "\x11", "\x12"
ALTERNATE_SCREEN, MAIN_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"
SHOW_CURSOR = b"\x1b[?25h"
QUIET_S = 0.2


def wait_gone(processes: Sequence[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Wait for the end of `processes`, reaping none; those that are left after `timeout` s."""
    handles: dict[psutil.Process, ProcessHandle] = {}
    for process in processes:
        with suppress(ProcessLookupError):
            handles[process] = ProcessHandle(process.pid)
    wait_all_gone(handles.values(), timeout)
    left = [process for process, handle in handles.items() if not handle.gone()]
    for handle in handles.values():
        handle.close()
    return left


class Terminal:
    """Runs `command` from the repository's folder in a terminal of `columns` × `rows`.

    All its processes, however they are detached, are known by the state folder in their
    environment. At the end of the `with` block none of them is left.
    """

    def __init__(
        self, command: Sequence[str], state: Path, *, columns: int = 120, rows: int = 36
    ) -> None:
        self.transcript = b""
        """Every byte that the program has written."""
        self._state = str(state)
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        environment = {
            **os.environ,
            "TERM": "xterm-256color",
            "COLORTERM": "truecolor",
            "JUPITER_STATE_DIR": self._state,
        }
        self._child: Any = pexpect.spawn(
            command[0],
            list(command[1:]),
            dimensions=(rows, columns),
            env=environment,
            cwd=str(ROOT),
            timeout=None,
        )
        self._child.delaybeforesend = None
        self._modes = termios.tcgetattr(self._child.child_fd)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None:
            print(self._told(f"{type(error).__name__} after"))
        for process in self.processes():
            process.kill()
        self._child.close(force=True)

    @property
    def pid(self) -> int:
        """The process that was started."""
        return int(self._child.pid)

    @property
    def screen(self) -> str:
        """What the screen shows, without trailing blanks."""
        # Not pyte's `display`, which fails on half a wide character; joined, its stubs are empty.
        rows, columns = range(self._screen.lines), range(self._screen.columns)
        lines = ("".join(self._screen.buffer[y][x].data for x in columns) for y in rows)
        return "\n".join(line.rstrip() for line in lines).rstrip()

    @property
    def modes_restored(self) -> bool:
        """Whether echo, line editing and signal keys are as they were before the start."""
        return bool(termios.tcgetattr(self._child.child_fd)[:4] == self._modes[:4])

    def processes(self) -> list[psutil.Process]:
        """The processes of the run that are alive."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("JUPITER_STATE_DIR") == self._state:
                    found.append(process)
            except psutil.Error:
                continue
        return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def send(self, keys: str) -> None:
        """Type `keys`, as the bytes that a terminal would send."""
        self._child.send(keys)

    def resize(self, columns: int, rows: int) -> None:
        """Make the window another size."""
        self._screen.resize(rows, columns)
        self._child.setwinsize(rows, columns)

    def close_window(self) -> None:
        """Take the terminal away, as a closed window or a lost connection does."""
        self._child.ptyproc.fileobj.close()

    def wait_for(self, what: str | Callable[[str], object], timeout: float = 30.0) -> str:
        """Wait until the screen has the text `what` (or until it is true of it); the screen."""
        seen = (lambda screen: what in screen) if isinstance(what, str) else what
        name = repr(what) if isinstance(what, str) else "what it tells by"
        deadline = time.monotonic() + timeout
        while not seen(self.screen):
            left = deadline - time.monotonic()
            if left <= 0:
                raise AssertionError(self._told(f"waited {timeout:g} s in vain for {name}"))
            if not self._read(left) and not seen(self.screen):
                raise AssertionError(self._told(f"the program ended before {name}"))
        return self.screen

    def wait_exit(self, timeout: float = 10.0) -> int:
        """Wait for the end of the program; its exit code, or minus the signal that ended it."""
        deadline = time.monotonic() + timeout
        while self._read(deadline - time.monotonic()):
            if time.monotonic() >= deadline:
                raise AssertionError(self._told(f"still running after {timeout:g} s"))
        self._child.wait()
        code = self._child.exitstatus
        return int(-self._child.signalstatus if code is None else code)

    def wait_gone(self, timeout: float = 5.0) -> None:
        """Wait until no process of the run is left."""
        left = wait_gone(self.processes(), timeout) + self.processes()
        if left:
            names = [" ".join(process.cmdline()) for process in left]
            raise AssertionError(self._told(f"left after {timeout:g} s: {names}"))

    def _read(self, timeout: float) -> bool:
        """Take in what was written; False at the end of the program."""
        try:
            data = self._child.read_nonblocking(65536, min(max(timeout, 0.0), QUIET_S))
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.transcript += data
        self._stream.feed(data)
        return True

    def _told(self, what: str) -> str:
        frame = "─" * self._screen.columns
        return f"{what}; the screen:\n{frame}\n{self.screen}\n{frame}"
