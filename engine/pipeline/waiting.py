"""Requests that wait for a place: in the order in which they came, forks before all others."""

from __future__ import annotations

import time
from collections import OrderedDict

from engine.pipeline.sequence import Fork
from engine.protocol import Generate


class WaitingRequests:
    """Thousands may wait: none of these calls looks at more than one of them."""

    def __init__(self) -> None:
        # A fork is part of an answer that has begun.
        self._forks: OrderedDict[str, tuple[Generate, float]] = OrderedDict()
        self._others: OrderedDict[str, tuple[Generate, float]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._forks or self._others)

    def put(self, request: Generate) -> None:
        """Let a request wait behind others of its kind."""
        queue = self._forks if isinstance(request, Fork) else self._others
        queue[request.request_id] = request, time.perf_counter()

    def pop(self) -> tuple[Generate, float]:
        """The next one, and when it came (time.perf_counter)."""
        return (self._forks or self._others).popitem(last=False)[1]

    def put_back(self, request: Generate, arrived: float) -> None:
        """What `pop` has just given cannot be served yet: it stays the next one."""
        queue = self._forks if isinstance(request, Fork) else self._others
        queue[request.request_id] = request, arrived
        queue.move_to_end(request.request_id, last=False)

    def remove(self, request_id: str) -> bool:
        """Whether it waited."""
        gone = self._forks.pop(request_id, None) or self._others.pop(request_id, None)
        return gone is not None
