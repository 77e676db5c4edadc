"""The answers that are being given, and who works on them: one engine, then perhaps another."""

from __future__ import annotations

import asyncio
from typing import Protocol

from engine.continuity import AnswerStream
from engine.errors import EngineError
from engine.protocol import Generate
from engine.request import RequestStream


class Answerer(Protocol):
    """What is needed of an engine's client here."""

    def send(self, request: Generate) -> RequestStream: ...
    def cancel(self, request_id: str) -> None: ...


class Answers:
    """All answers that have not ended. While they are held no engine works on them."""

    def __init__(self) -> None:
        self.held = False
        self._open: dict[str, AnswerStream] = {}
        self._parts: dict[str, asyncio.Task[None]] = {}

    def add(self, engine: Answerer, request: Generate) -> AnswerStream:
        """Have a new request answered, now or when the hold ends.

        Raises EngineError when the engine takes none.
        """
        stream = AnswerStream(request)
        stream.held = self.held
        if not self.held:
            self._play(engine, stream, request)
        self._open[stream.request_id] = stream
        return stream

    def cancel(self, engine: Answerer, request_id: str) -> None:
        """End an answer with what it has; nothing if it has ended."""
        stream = self._open.get(request_id)
        if stream is None:
            return
        stream.cancelled = True
        if request_id in self._parts:
            engine.cancel(request_id)
        else:
            stream.end_cancelled()
            del self._open[request_id]

    def hold(self, engine: Answerer, *, for_good: bool = False) -> None:
        """Have the engine stop all of them at the end of a step; `settled` waits for that.

        With `for_good` those of now end there; what is added later waits all the same.
        """
        self.held = True
        for stream in self._open.values():
            stream.held = True
            stream.cancelled |= for_good
        for request_id in self._parts:
            engine.cancel(request_id)

    async def settled(self, timeout: float | None = None) -> None:
        """Wait until no engine works on any of them, at most `timeout` seconds."""
        if self._parts:
            await asyncio.wait(self._parts.values(), timeout=timeout)

    def go_on(self, engine: Answerer) -> None:
        """End the hold: each answer goes on behind its last token, on `engine`."""
        self.held = False
        for stream in self._open.values():
            stream.held = False
            try:
                self._play(engine, stream, stream.continuation())
            except EngineError as error:
                stream.fail(error)
        self._forget_ended()

    def fail(self, error: EngineError) -> None:
        """End the hold without an engine: what was held ends with `error`."""
        self.held = False
        for stream in self._open.values():
            stream.held = False
            stream.fail(error)
        self._forget_ended()

    def _play(self, engine: Answerer, stream: AnswerStream, request: Generate) -> None:
        part = engine.send(request)
        self._parts[stream.request_id] = asyncio.create_task(self._follow(stream, part))

    async def _follow(self, stream: AnswerStream, part: RequestStream) -> None:
        try:
            async for event in part:
                stream.part(event)
        except EngineError as error:
            if not stream.held:
                stream.fail(error)
            elif stream.cancelled:
                stream.end_cancelled()
        del self._parts[stream.request_id]
        self._forget_ended()

    def _forget_ended(self) -> None:
        for request_id in [name for name, stream in self._open.items() if stream.ended]:
            del self._open[request_id]
