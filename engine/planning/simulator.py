"""A small simulation of the pipeline: micro-batches one behind the other through all stages. Pure.

Each stage works on one micro-batch at a time, in their order, and sends on while it computes the
next. Stages of one host share its cores: while several compute, each takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Hop:
    """What one message needs to get to the next stage, in seconds."""

    latency_s: float = 0.0
    transfer_s: float = 0.0
    """For so long no other message can use the link."""


@dataclass(frozen=True)
class Span:
    """A stage at work on a micro-batch; seconds from the start."""

    rank: int
    batch: int
    began: float
    ended: float


@dataclass(frozen=True)
class Sharing:
    """Which stages share a host, and how that slows them."""

    hosts: Sequence[object]
    """Of each stage."""
    slowdown: Sequence[float]
    """Of each stage, while all stages of its host compute."""

    def factor(self, rank: int, busy: int) -> float:
        """How many times longer stage `rank` takes while `busy` stages of its host compute."""
        together = self.hosts.count(self.hosts[rank])
        if together == 1:
            return 1.0
        return 1.0 + (self.slowdown[rank] - 1.0) * (busy - 1) / (together - 1)


def alone(stages: int) -> Sharing:
    """Every stage on a machine of its own."""
    return Sharing(list(range(stages)), [1.0] * stages)


@dataclass
class Simulated:
    """What came of it."""

    spans: list[Span] = field(default_factory=list)
    landed: list[float] = field(default_factory=list)
    """When the result of each micro-batch was back at the first stage."""

    @property
    def seconds(self) -> float:
        """Until the last result was back."""
        return self.landed[-1]

    def bubble(self, stages: int) -> float:
        """The share of all stages' time in which they had nothing to compute."""
        busy = sum(span.ended - span.began for span in self.spans)
        return 1.0 - busy / (stages * self.seconds)


def simulate(
    work: Sequence[Sequence[float]],
    hops: Sequence[Sequence[Hop]],
    sharing: Sharing,
    *,
    flights: int | None = None,
) -> Simulated:
    """Follow micro-batches through the stages.

    Args:
        work: seconds of each micro-batch on each stage while no other computes, [batch][stage].
        hops: its way to the next stage, and from the last back to the first, [batch][stage].
        sharing: of each stage.
        flights: micro-batches that may be under way at once; None for any number.
    """
    stages, batches = len(sharing.hosts), len(work)
    out = Simulated()
    arrived: list[list[float]] = [[0.0] * batches, *([[] for _ in range(stages - 1)])]
    link_free = [0.0] * stages
    done = [0] * stages  # micro-batches that each stage has finished
    left: list[float | None] = [None] * stages
    began = [0.0] * stages
    now = 0.0

    def ready_at(rank: int) -> float:
        """When the next micro-batch of an idle stage is there, infinite while it is not known."""
        batch = done[rank]
        if batch >= len(arrived[rank]):
            return math.inf
        at = arrived[rank][batch]
        if rank == 0 and flights is not None and batch >= flights:
            waits_for = batch - flights
            at = max(at, out.landed[waits_for]) if waits_for < len(out.landed) else math.inf
        return at

    while len(out.landed) < batches:
        for rank in range(stages):
            if left[rank] is None and ready_at(rank) <= now:
                left[rank], began[rank] = work[done[rank]][rank], now
        busy = [rank for rank in range(stages) if left[rank] is not None]
        crowd: dict[object, int] = {}
        for rank in busy:
            crowd[sharing.hosts[rank]] = crowd.get(sharing.hosts[rank], 0) + 1
        pace = {rank: sharing.factor(rank, crowd[sharing.hosts[rank]]) for rank in busy}
        ends = {rank: now + (left[rank] or 0.0) * pace[rank] for rank in busy}
        idle = [ready_at(rank) for rank in range(stages) if left[rank] is None]
        then = min([*ends.values(), *idle])
        for rank in busy:
            if ends[rank] <= then:
                _leave(rank, then, began[rank], done, hops, link_free, arrived, out)
                left[rank] = None
            else:
                left[rank] = (left[rank] or 0.0) - (then - now) / pace[rank]
        now = then
    return out


def _leave(
    rank: int,
    now: float,
    began: float,
    done: list[int],
    hops: Sequence[Sequence[Hop]],
    link_free: list[float],
    arrived: list[list[float]],
    out: Simulated,
) -> None:
    """A stage has finished a micro-batch: it goes on its way."""
    batch, hop = done[rank], hops[done[rank]][rank]
    out.spans.append(Span(rank, batch, began, now))
    link_free[rank] = max(now, link_free[rank]) + hop.transfer_s
    at = link_free[rank] + hop.latency_s
    if rank == len(arrived) - 1:
        out.landed.append(at)
    else:
        arrived[rank + 1].append(at)
    done[rank] += 1
