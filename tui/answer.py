"""Follows one request: the stream's events become messages, at a pace that a screen can show."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, Callable

from textual.message import Message

from engine.errors import EngineError
from engine.protocol import Failed, Finished, Started, Tokens
from tui.messages import AnswerFailed, AnswerFinished, AnswerGrew, AnswerLost, AnswerStarted

INTERVAL_S = 0.08
Post = Callable[[Message], object]
Answer = AsyncIterable[Started | Tokens | Finished | Failed]


class Coalescer:
    """Joins tokens: the first are posted at once, later ones at most every `interval` seconds."""

    def __init__(self, request_id: str, post: Post, interval: float) -> None:
        self._request_id = request_id
        self._post = post
        self._interval = interval
        self._events: list[Tokens] = []
        self._last_at = 0.0
        self._pause: asyncio.TimerHandle | None = None

    def add(self, event: Tokens) -> None:
        """Post `event` now, or with others at the end of the pause."""
        self._events.append(event)
        self._last_at = time.monotonic()
        if self._pause is None:
            self._post_pending()

    def flush(self) -> None:
        """Post what is pending and stop the clock."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._events:
            self._post(self._take())

    def _post_pending(self) -> None:
        self._pause = None
        if self._events:
            self._post(self._take())
            loop = asyncio.get_running_loop()
            self._pause = loop.call_later(self._interval, self._post_pending)

    def _take(self) -> AnswerGrew:
        events, self._events = self._events, []
        return AnswerGrew(self._request_id, events, self._last_at)


async def follow(
    request_id: str, stream: Answer, post: Post, *, interval: float = INTERVAL_S
) -> None:
    """Post the messages of one request until it has ended; never raises an EngineError."""
    pending = Coalescer(request_id, post, interval)
    try:
        async for event in stream:
            match event:
                case Tokens():
                    pending.add(event)
                case Started():
                    post(AnswerStarted(event))
                case Finished():
                    pending.flush()
                    post(AnswerFinished(event))
                case Failed():
                    pending.flush()
                    post(AnswerFailed(event))
    except EngineError:
        pending.flush()
        post(AnswerLost(request_id))
    finally:
        pending.flush()
