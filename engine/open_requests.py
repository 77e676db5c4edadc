"""The requests that are open, each with what it takes to have another engine go on with it."""

from __future__ import annotations

import secrets

from msgspec.structs import replace

from engine.continuity import AnswerStream
from engine.errors import EngineError
from engine.protocol import Failed, Finished, Generate, Tokens
from engine.request import Answer

MAX_OPEN_REQUESTS = 4096


class OpenRequests:
    """All streams that have not ended, by request id."""

    def __init__(self) -> None:
        self._streams: dict[str, AnswerStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._streams

    def add(self, request: Generate) -> AnswerStream:
        """Open a request; one without a seed is given one, so that it can be continued.

        Raises EngineError when too many are open.
        """
        if len(self._streams) >= MAX_OPEN_REQUESTS:
            raise EngineError(f"{MAX_OPEN_REQUESTS} requests are open; wait for one to end")
        if request.params.seed is None:
            params = replace(request.params, seed=secrets.randbits(62))
            request = replace(request, params=params)
        stream = self._streams[request.request_id] = AnswerStream(request)
        return stream

    def take(self, event: Answer) -> bool:
        """Pass an event on to its stream; whether it brings the answer further."""
        stream = self._streams.get(event.request_id)
        if stream is None:
            return False
        stream.part(event)
        if isinstance(event, Finished | Failed):
            del self._streams[event.request_id]
            return True
        return isinstance(event, Tokens) and bool(event.token_ids)

    def cancelled(self, request_id: str) -> None:
        """The engine was told to end a request; if it is lost before it does, it ends as well."""
        self._streams[request_id].cancelled = True

    def lost(self) -> None:
        """The engine that worked on them is gone."""
        for name, stream in tuple(self._streams.items()):
            stream.lost()
            if stream.cancelled:
                self.end_cancelled(name)

    def continuations(self) -> list[Generate]:
        """The requests that make another engine go on with each, oldest first."""
        return [stream.continuation() for stream in self._streams.values()]

    def end_cancelled(self, request_id: str) -> None:
        """End a request that no engine works on, with what it has."""
        self._streams.pop(request_id).end_cancelled()

    def fail(self, error: EngineError) -> None:
        """End all of them with `error`."""
        for stream in self._streams.values():
            stream.fail(error)
        self._streams.clear()
