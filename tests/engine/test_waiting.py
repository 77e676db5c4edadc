"""Requests that wait: their order, and that thousands of them cost little."""

from __future__ import annotations

from engine.pipeline.sequence import Fork
from engine.pipeline.waiting import WaitingRequests
from engine.protocol import Generate


def test_first_come_first_served_but_forks_before_all() -> None:
    waiting = WaitingRequests()
    for name in "abc":
        waiting.put(Generate(request_id=name, prompt="x"))
    for name in "xy":
        waiting.put(Fork(request_id=name, prompt="x"))
    assert waiting.remove("b")
    assert not waiting.remove("b")
    request, arrived = waiting.pop()
    waiting.put_back(request, arrived)
    order = []
    while waiting:
        order.append(waiting.pop()[0].request_id)
    assert order == ["x", "y", "a", "c"]
