"""The places of the other machines in a run, and who has them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from engine.nodes.messages import Join, printable

MAX_NAME = 40


@dataclass
class Seat:
    """The place of node `number`; the first machine, node 0, has none."""

    number: int
    name: str = ""
    """Of the machine that has it, or had it last; "" before the first."""
    instance: str = ""
    identity: bytes = b""
    """Of its connection; empty while nobody has the seat."""
    heard: float = 0.0
    left_at: float | None = None
    """Wall-clock time at which it was lost."""
    why: str = ""
    """What became of the last one."""
    doing: str = ""
    prepared: int = 0
    """Number of the last Prepare that it is done with."""
    begun: bool = False
    """Its workers have been started."""
    ranks: range = field(default_factory=lambda: range(0))

    @property
    def taken(self) -> bool:
        """Whether a machine has it now."""
        return bool(self.identity)

    def title(self) -> str:
        """For people: "node 1 (kitchen)"."""
        return f"node {self.number} ({self.name})" if self.name else f"node {self.number}"

    def take(self, join: Join, identity: bytes) -> None:
        """A machine sits down."""
        self.name, self.instance = printable(join.name)[:MAX_NAME], join.instance
        self.identity = identity
        self.heard = time.monotonic()
        self.left_at = None
        self.why = ""
        self.doing = f"{self.title()} has joined"
        self.prepared = 0
        self.begun = False

    def leave(self, why: str) -> None:
        """It is free again."""
        self.identity = b""
        self.left_at = time.time()
        self.why = why
        self.doing = ""
        self.prepared = 0
        self.begun = False

    def silent_s(self) -> float:
        """Seconds since the machine was heard."""
        return time.monotonic() - self.heard

    def missing(self) -> str:
        """What is said while nobody has it."""
        if self.left_at is None:
            return f"waiting for node {self.number}"
        since = time.strftime("%H:%M:%S", time.localtime(self.left_at))
        return f"waiting for {self.title()}, which {self.why} (at {since})"


def choose(seats: list[Seat], join: Join) -> Seat | None:
    """The seat for a machine that asks: its own, the one of its name, or any that is free."""
    for seat in seats:
        if seat.taken and seat.instance == join.instance:
            return seat
    free = [seat for seat in seats if not seat.taken]
    named = [seat for seat in free if seat.name == join.name]
    new = [seat for seat in free if not seat.name]
    return next(iter([*named, *new, *free]), None)


def share_out(world_size: int, machines: int) -> list[range]:
    """Ranks of each machine: in order, as even as may be, the first ones having more."""
    each, rest = divmod(world_size, machines)
    shares, first = [], 0
    for machine in range(machines):
        count = each + (machine < rest)
        shares.append(range(first, first + count))
        first += count
    return shares
