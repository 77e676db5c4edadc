"""A conversation line by line: questions from stdin, answers to stdout, all else to stderr."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from engine.cli.console import figures
from engine.client import ClientState, EngineClient, Fetching, RequestStream, StateChanged, Update
from engine.config import JupiterConfig
from engine.errors import EngineError, ExitCode
from engine.protocol import EventEnvelope, Failed, Finished, Message, Notice, Tokens
from engine.training.answering import Sampling

HELP = "`clear` begins a new conversation, `exit` or Ctrl+D ends; Ctrl+C stops an answer"


class ChatLoop:
    """One engine and one conversation.

    Args:
        system: system message.
        stream: show an answer as it is written.
    """

    def __init__(
        self, config: JupiterConfig, sampling: Sampling, system: str | None, *, stream: bool
    ) -> None:
        self._sampling, self._stream = sampling, stream
        self._start = [] if system is None else [Message("system", system)]
        self._messages = list(self._start)
        self._client = EngineClient(config, listener=self._on_update)
        self._terminal = sys.stdin is not None and sys.stdin.isatty()
        self._asked: RequestStream | None = None
        self._read = b""
        """The beginning of a line."""
        self._lines: asyncio.Queue[str | None] = asyncio.Queue()
        self._failed = False
        self._death = ""

    def run(self) -> int:
        """Talk until the input ends; returns the exit code. Raises JupiterError."""
        return asyncio.run(self._run())

    async def _run(self) -> int:
        talk = asyncio.create_task(self._talk())
        with self._signals(talk) as caught:
            try:
                await talk
            except asyncio.CancelledError:
                if not caught:
                    raise
            except EngineError as error:
                raise EngineError(self._death or str(error)) from None
            finally:
                await self._client.stop()
        if caught:
            return 128 + caught[0]
        return ExitCode.SOME_FAILED if self._failed else ExitCode.OK

    async def _talk(self) -> None:
        await self._client.start()
        if self._terminal:
            _say(HELP)
        self._read_lines()
        while True:
            if self._terminal:
                print("> ", end="", file=sys.stderr, flush=True)
            line = await self._lines.get()
            if line is None or line.strip() in ("exit", "quit"):
                return
            if line.strip() == "clear":
                self._messages = list(self._start)
            elif line.strip():
                await self._answer(line)

    async def _answer(self, question: str) -> None:
        """Ask and show the answer; what failed is left out of the conversation."""
        messages = [*self._messages, Message("user", question)]
        params = self._sampling.params(self._sampling.seed)
        self._asked = self._client.submit(messages=messages, params=params)
        text = ""
        try:
            async for event in self._asked:
                if isinstance(event, Tokens):
                    text += event.text
                    if self._stream:
                        print(event.text, end="", flush=True)
                elif isinstance(event, Failed):
                    self._failed = True
                    _say(event.message)
                elif isinstance(event, Finished):
                    print("" if self._stream else text, flush=True)
                    _say(figures(event))
                    self._messages = [*messages, Message("assistant", text)]
        finally:
            self._asked = None

    def _read_lines(self) -> None:
        """Put the lines of stdin into the queue as they come, and None at its end."""
        kind = os.fstat(0).st_mode
        if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind) or os.isatty(0)):
            with open(0, "rb", closefd=False) as file:  # such a file cannot be waited for
                self._take(file.read() or b"\n")
            self._take(b"")
            return
        # No thread: one that waits in a read would keep the process from ending.
        asyncio.get_running_loop().add_reader(0, lambda: self._take(os.read(0, 1 << 16)))

    def _take(self, data: bytes) -> None:
        ended = not data
        *lines, self._read = (self._read + (b"\n" if ended else data)).split(b"\n")
        for line in lines:
            self._lines.put_nowait(line.decode("utf-8", "replace").rstrip("\r"))
        if ended:
            asyncio.get_running_loop().remove_reader(0)
            self._lines.put_nowait(None)

    @contextmanager
    def _signals(self, talk: asyncio.Task[None]) -> Iterator[list[int]]:
        """Ctrl+C stops an answer, or else ends all, as SIGTERM does; yields what ended it."""
        caught: list[int] = []

        def end(number: int) -> None:
            if caught:
                self._client.kill_now()
                os._exit(128 + number)
            if number == signal.SIGINT and self._asked is not None and self._terminal:
                self._client.cancel(self._asked.request_id)
                return
            caught.append(number)
            talk.cancel()

        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, end, int(number))
        try:
            yield caught
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_update(self, update: Update) -> None:
        if isinstance(update, StateChanged) and update.state is ClientState.DEAD:
            self._death = self._death or update.reason
        elif isinstance(update, Fetching):
            _say(update.message)
        elif isinstance(update, EventEnvelope) and isinstance(update.body, Notice):
            _say(update.body.message)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
