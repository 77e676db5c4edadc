"""The workbench on a real terminal: signals, the end of the engine, and a terminal left as found.

Textual is imported only here and below, and only after the guard process has been forked.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import termios
import threading
from contextlib import AbstractContextManager, nullcontext
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from engine.config import JupiterConfig

if TYPE_CHECKING:
    from engine.nodes.hub import Hub
    from tui.app import JupiterApp
    from tui.session import ClientFactory

STOP_LIMIT_S = 5.0
# Mouse, focus and paste reports, in-band resize and the kitty keyboard off; line wrap, main screen
# and cursor back; colours reset.
RESTORE = (
    b"\x1b[?1000l\x1b[?1003l\x1b[?1006l\x1b[?1015l\x1b[?1016l\x1b[?1004l\x1b[?2004l\x1b[?2048l"
    b"\x1b[<u\x1b[?7h\x1b[?1049l\x1b[?25h\x1b[0m"
)
LAST_WORDS = b"\r\njupiter-tui was killed; its engine is stopping.\r\n"


def run(
    config: JupiterConfig,
    config_given: str | None = None,
    make_client: ClientFactory | None = None,
    hub: Hub | None = None,
) -> int:
    """Open the workbench and run it to its end; no engine process is left afterwards.

    `config_given` is the path of `--config`, if there was one; `make_client` puts another engine
    in the place of the real one; `hub` has the other machines, if there are any. Returns the exit
    code. Raises the JupiterError of a start that no key could have mended.
    """
    with _guard():
        from tui.app import JupiterApp

        app = JupiterApp(config, make_client, config_given=config_given, hub=hub)
        loop = asyncio.new_event_loop()
        try:
            code = loop.run_until_complete(_live(app))
            loop.run_until_complete(_cancel_rest())
        finally:
            loop.close()
    if app.session.error is not None and code == app.session.error.exit_code:
        raise app.session.error
    return code


def _guard() -> AbstractContextManager[None]:
    """For the terminal, if there is one: textual-serve has the workbench write into a pipe."""
    if sys.stdin.isatty():
        return TerminalGuard(sys.stdin.fileno(), sys.stderr.fileno())
    return nullcontext()


async def _live(app: JupiterApp) -> int:
    _end_on_signals(app, asyncio.get_running_loop())
    try:
        code = await app.run_async()
    finally:
        await app.session.stop()
    return (app.return_code or 0) if code is None else code


async def _cancel_rest() -> None:
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)


def _end_on_signals(app: JupiterApp, loop: asyncio.AbstractEventLoop) -> None:
    """SIGINT, SIGTERM and SIGHUP stop the engine and restore the terminal, then end the run."""

    def end(signum: int, _: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            _detach_from_lost_terminal(app, 128 + signum)
        loop.call_soon_threadsafe(app.end_run, 128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, end)


def _detach_from_lost_terminal(app: JupiterApp, code: int) -> None:
    """Let what is still written go nowhere; a write to a closed terminal would block the loop.

    The deadline covers a write that failed just before.
    """

    def give_up() -> None:
        app.session.kill_now()
        os._exit(code)

    deadline = threading.Timer(STOP_LIMIT_S, give_up)
    deadline.daemon = True
    deadline.start()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)


class TerminalGuard:
    """A small child process that puts the terminal right if this process is killed outright.

    Nothing in a process can act on SIGKILL; so the child waits on a pipe, and its end without a
    farewell byte means that the terminal was left in raw mode on the alternate screen.
    """

    def __init__(self, keyboard: int, screen: int) -> None:
        self._keyboard = keyboard
        self._screen = screen

    def __enter__(self) -> None:
        attributes = termios.tcgetattr(self._keyboard)
        watched, self._alive = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._alive)
                self._watch(watched, attributes)
            finally:
                os._exit(0)
        os.close(watched)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        os.write(self._alive, b".")
        os.close(self._alive)
        os.waitpid(self._pid, 0)

    def _watch(self, watched: int, attributes: list[object]) -> None:
        # A group of its own, so that a kill of the whole job leaves somebody to clean up.
        os.setpgid(0, 0)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTOU):
            signal.signal(signum, signal.SIG_IGN)
        if os.read(watched, 1):
            return
        os.write(self._screen, RESTORE)
        termios.tcsetattr(self._keyboard, termios.TCSAFLUSH, attributes)  # type: ignore[arg-type]
        os.write(self._screen, LAST_WORDS)
