"""One request as its asker sees it: a stream of events."""

from __future__ import annotations

import asyncio
from collections import deque

from engine.errors import EngineError
from engine.protocol import Failed, Finished, Started, Tokens

Answer = Started | Tokens | Finished | Failed


class RequestStream:
    """The events of one request: Started, Tokens..., at last Finished or Failed.

    Iterate over it once, in one task. Raises the EngineError when the engine ends; what arrived
    before is given first. It holds no more than one answer.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._events: deque[Answer] = deque()
        self._changed = asyncio.Event()
        self._ended = False
        self._error: EngineError | None = None

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Answer:
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        return self._events.popleft()

    def put(self, event: Answer) -> None:
        """Add what a worker sent; for the client."""
        self._events.append(event)
        self._ended = isinstance(event, Finished | Failed)
        self._changed.set()

    def fail(self, error: EngineError) -> None:
        """End the stream with `error`; for the client."""
        self._error = error
        self._changed.set()
