"""What the hub's thread does: takes what the machines send, and passes on what is for others."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import zmq

from engine.endpoint import waiting_frames
from engine.nodes.attached import Attached
from engine.nodes.messages import (
    BEAT_S,
    LOST_S,
    VERSION,
    Answered,
    Asked,
    Beat,
    Begin,
    Change,
    Doing,
    End,
    Ended,
    Exit,
    Failed,
    Join,
    Leave,
    Logged,
    Part,
    Prepare,
    Prepared,
    Queued,
    Refused,
    Rejoin,
    ToFirst,
    ToNode,
    Wanted,
    decode_to_first,
    encode,
    printable,
    release,
)
from engine.nodes.messages import Seat as SeatTaken
from engine.nodes.seats import Seat, choose
from engine.nodes.weights import read_part

SLEPT_S = 1.0
"""A look round that comes so late tells that it was this process that stood still."""
AT_ONCE = 256
"""Messages that are taken before others get their turn."""


class Switchboard:
    """For one thread only.

    Args:
        router: the socket that the machines are connected to.
        poller: gets the other sockets to be waited for.
        seats: of the machines.
        lost: called with a machine's number, and why it works no more.
        changed: called when a machine has come, has gone, or is further.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        router: zmq.Socket[bytes],
        poller: zmq.Poller,
        seats: list[Seat],
        lost: Callable[[int, str], None],
        changed: Callable[[], None],
    ) -> None:
        self._context, self._router, self._poller = context, router, poller
        self._seats = seats
        self._lost, self._changed = lost, changed
        self._attached: Attached | None = None
        self._prepare: Prepare | None = None
        self._sources: tuple[list[Path], list[Path]] = ([], [])
        self._looked = time.monotonic()

    def prepare(self, prepare: Prepare, model: list[Path], heads: list[Path]) -> None:
        """Have all machines, also those that come later, get these files ready."""
        self._prepare, self._sources = prepare, (model, heads)
        self.send_to_all(prepare)

    def serve(self, ready: dict[object, int]) -> None:
        """Take what has arrived on the sockets that are `ready`."""
        if self._router in ready:
            for _ in range(AT_ONCE):
                try:
                    identity, frame = self._router.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                except ValueError:  # not two frames: no client of ours
                    continue
                self._take(identity, frame)
        attached = self._attached
        if attached is not None:
            if attached.commands in ready:
                for command in waiting_frames(attached.commands):
                    self._send_to_begun(Queued(command))
            if attached.exchange in ready:
                self._answer(attached.asked_here())

    def close(self) -> None:
        """Let go of the launch, if there is one."""
        if self._attached is not None:
            self._attached.close(self._poller)

    def beat(self) -> None:
        """Say and look, every BEAT_S seconds, that both sides are there."""
        now = time.monotonic()
        late = now - self._looked
        if late < BEAT_S:
            return
        self._looked = now
        for seat in self._seats:
            if late > SLEPT_S:
                seat.heard = now
            if seat.taken and seat.silent_s() > LOST_S:
                self._lose(seat, f"has been silent for {seat.silent_s():.1f} s")
            self.send(seat, Beat())

    def send(self, seat: Seat, message: ToNode) -> None:
        """Send something to a machine, if it is there."""
        if seat.taken:
            self._reply(seat.identity, message)

    def _reply(self, identity: bytes, message: ToNode) -> None:
        with suppress(zmq.ZMQError):
            self._router.send_multipart([identity, encode(message)], zmq.NOBLOCK)

    def send_to_all(self, message: ToNode) -> None:
        """The same to all machines."""
        for seat in self._seats:
            self.send(seat, message)

    def _send_to_begun(self, message: ToNode) -> None:
        for seat in self._seats:
            if seat.begun:
                self.send(seat, message)

    def _take(self, identity: bytes, frame: bytes) -> None:
        message = decode_to_first(frame)
        seat = next((seat for seat in self._seats if seat.identity == identity), None)
        if isinstance(message, Join):
            if seat is None:
                self._seat(message, identity)
        elif seat is None:
            self._reply(identity, Rejoin())
        else:
            seat.heard = time.monotonic()
            self._handle(seat, message)

    def _seat(self, join: Join, identity: bytes) -> None:
        if (join.version, join.release) != (VERSION, release()):
            reason = f"the first machine runs release {release()}, this one {join.release}"
            self._reply(identity, Refused(reason, passing=False))
            return
        seat = choose(self._seats, join)
        if seat is None:
            reason = f"all {len(self._seats) + 1} machines are here already"
            self._reply(identity, Refused(reason, passing=True))
            return
        if seat.taken:
            self._lose(seat, "has lost its connection")
        seat.take(join, identity)
        self.send(seat, SeatTaken(seat.number, len(self._seats) + 1))
        if self._prepare is not None:
            self.send(seat, self._prepare)
        self._changed()

    def _handle(self, seat: Seat, message: ToFirst | None) -> None:
        attached = self._attached
        match message:
            case Doing(text):
                seat.doing = f"{seat.title()}: {printable(text)}"
                self._changed()
            case Prepared(number):
                seat.prepared, seat.doing = number, ""
                self._changed()
            case Wanted():
                self._send_part(seat, message)
            case Failed():
                self._failed(seat, message)
            case Leave():
                self._lose(seat, "was stopped")
            case _ if attached is None or not seat.begun:
                return
            case Queued(frame):
                attached.event(frame)
            case Ended(pid):
                attached.ended(seat.number, pid)
            case Exit():
                attached.exited(seat.number, message)
            case Logged(rank, data) if rank in seat.ranks:
                attached.log(rank, data)
            case Asked(asker, frame):
                self._answer(attached.asked((seat.identity, asker), frame))

    def _answer(self, answers: list[tuple[tuple[bytes, bytes], bytes]]) -> None:
        for (identity, asker), frame in answers:
            if identity:
                self._reply(identity, Answered(asker, frame))
            elif self._attached is not None:
                self._attached.answer_here(asker, frame)

    def _send_part(self, seat: Seat, wanted: Wanted) -> None:
        try:
            path = self._sources[wanted.heads][wanted.file]
            data = read_part(path, wanted.offset)
        except (IndexError, OSError, OverflowError, ValueError):
            data = b""
        self.send(seat, Part(data))

    def _failed(self, seat: Seat, failed: Failed) -> None:
        message = printable(failed.message)
        if failed.leaves:
            self._lose(seat, f"was of no use: {message}")
        elif seat.begun:
            seat.begun = False
            self._lost(seat.number, f"{seat.title()}: {message}")
        else:
            seat.why = message
            self._changed()

    def _lose(self, seat: Seat, why: str) -> None:
        worked = seat.begun
        seat.leave(why)
        if worked:
            self._lost(seat.number, f"{seat.title()} {why}")
        self._changed()

    def begin(self, seat: Seat, begin: Begin) -> None:
        """Have a machine start its workers, or where they run tell it what is new."""
        if seat.begun:
            change = Change(epoch=begin.epoch, workers=begin.workers, config=begin.config)
            self.send(seat, change)
        elif seat.taken:
            seat.begun = True
            seat.ranks = range(begin.first_rank, begin.first_rank + begin.ranks)
            self.send(seat, begin)

    def attach(self, attached: Attached) -> None:
        """Pass on the frames of this launch from now on."""
        if self._attached is not None:
            self.detach(self._attached)
        attached.open(self._context, self._poller)
        self._attached = attached

    def detach(self, attached: Attached) -> None:
        """Have the machines end the workers of this launch; idempotent."""
        if self._attached is not attached:
            return
        self._send_to_begun(End())
        for seat in self._seats:
            seat.begun = False
        attached.close(self._poller)
        self._attached = None
