"""A worker's end of the shared queue.

Two threads serve the queue, because a worker's main thread may block in a neighbour's `recv`: one
owns the SUB socket and fills the inbox, one owns the PUSH socket and empties the outbox.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator

import zmq

from engine.dropped import DropCount
from engine.owners import exit_now, watch_owners
from engine.protocol import (
    PROTOCOL_VERSION,
    Command,
    Event,
    EventEnvelope,
    Heartbeat,
    Notice,
    StageSpans,
    StageState,
    StageTelemetry,
    TrainingStep,
    TreeChosen,
    decode_command,
    encode,
)

SEND_QUEUE = 64
"""Frames that ZeroMQ may hold; kept short, so that old telemetry waits where it can be replaced."""
MAX_NOTICES = 100
MAX_STEPS = 1000
"""Training steps that may wait: a run can outlive the one who watches it."""
RETRY_MS = 100

__all__ = ["Endpoint", "exit_now", "watch_owners"]


class Endpoint:
    """A worker's end of the shared queue.

    Args:
        events: address of the client's PULL socket.
        commands: address of the client's PUB socket.
        rank: this worker's rank, stamped on every event.
        epoch: the launch this worker belongs to; commands of another one are dropped.
    """

    def __init__(self, events: str, commands: str, *, rank: int, epoch: int) -> None:
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        """Commands for this worker, heartbeats left out."""
        self._epoch = self._first_epoch = epoch
        self._outbox = _Outbox(rank, epoch)
        self._subscribed = threading.Event()
        self._context = zmq.Context()
        self._push = self._context.socket(zmq.PUSH)
        self._push.set_hwm(SEND_QUEUE)
        self._push.setsockopt(zmq.SNDTIMEO, RETRY_MS)
        self._push.connect(events)
        self._sub = self._context.socket(zmq.SUB)
        self._sub.set_hwm(0)  # the thread below always reads: no command may be dropped for it
        self._sub.subscribe(b"")
        self._sub.connect(commands)
        self._wake_read, self._wake_write = os.pipe()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._receive, name="jupiter-inbox", daemon=True),
            threading.Thread(target=self._outbox.run, args=(self._push,), name="jupiter-outbox"),
        ]
        self._threads[1].daemon = True
        for thread in self._threads:
            thread.start()

    def wait_subscribed(self, timeout_s: float) -> bool:
        """Wait for the first heartbeat: from then on no command is missed.

        A subscription takes a moment to reach the client, and what it publishes before is lost.
        Returns False after `timeout_s` seconds without one.
        """
        return self._subscribed.wait(timeout_s)

    def change_epoch(self, epoch: int) -> None:
        """Belong to another epoch from now on; events that have not left are dropped."""
        self._epoch = epoch
        self._outbox.change_epoch(epoch)

    def send(self, event: Event) -> None:
        """Queue `event` for the client; from any thread, never blocks.

        Telemetry and progress within a phase are latest-wins, notices beyond MAX_NOTICES and
        training steps beyond MAX_STEPS are left out, everything else is delivered in order.
        """
        self._outbox.put(event)

    def close(self, linger_s: float = 1.0) -> None:
        """Deliver what is queued, for at most `linger_s` seconds, and close; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._outbox.close(time.monotonic() + linger_s)
        os.write(self._wake_write, b"\0")
        for thread in self._threads:
            thread.join()  # neither blocks: polls, and sends with a timeout
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._context.term()

    def _receive(self) -> None:
        poller = zmq.Poller()
        poller.register(self._sub, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        dropped = DropCount("command")
        while self._wake_read not in dict(poller.poll(dropped.wait_ms())):
            for frame in waiting_frames(self._sub):
                envelope = decode_command(frame)
                if envelope is not None and self._is_of_a_neighbour_epoch(envelope.epoch):
                    continue
                if envelope is None or envelope.epoch != self._epoch:
                    dropped.count += 1
                elif isinstance(envelope.body, Heartbeat):
                    self._subscribed.set()
                else:
                    self.inbox.put(envelope.body)
            if notice := dropped.notice():
                self.send(notice)
        self._sub.close(linger=0)

    def _is_of_a_neighbour_epoch(self, epoch: int) -> bool:
        """Of what this worker was part of before, or will be after the Regroup in the inbox."""
        return self._first_epoch <= epoch < self._epoch or epoch > self._epoch


def waiting_frames(socket: zmq.Socket[bytes], limit: int = 256) -> Iterator[bytes]:
    """The frames that have arrived on `socket`, at most `limit` of them; never blocks."""
    for _ in range(limit):
        try:
            yield socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return


class _Outbox:
    """Events on their way out. Bounded but for those that a request's answer is made of."""

    def __init__(self, rank: int, epoch: int) -> None:
        self._rank = rank
        self._epoch = epoch
        self._ready = threading.Condition()
        self._events: deque[Event] = deque()
        self._latest: dict[type[Event], Event] = {}
        self._notices = 0
        self._deadline: float | None = None

    def change_epoch(self, epoch: int) -> None:
        with self._ready:
            self._epoch = epoch
            self._events.clear()
            self._latest.clear()
            self._notices = 0

    def put(self, event: Event) -> None:
        with self._ready:
            if self._deadline is not None:
                return
            if isinstance(event, StageTelemetry | StageSpans | TreeChosen):
                self._latest[type(event)] = event
            elif self._is_progress(event):
                self._events[-1] = event
            elif self._is_too_much(event):
                return
            else:
                self._notices += isinstance(event, Notice)
                self._events.append(event)
            self._ready.notify()

    def _is_too_much(self, event: Event) -> bool:
        """Whether so many of the kind wait already that nobody may be there to take them."""
        if isinstance(event, TrainingStep):
            return len(self._events) >= MAX_STEPS
        return isinstance(event, Notice) and self._notices >= MAX_NOTICES

    def _is_progress(self, event: Event) -> bool:
        """Whether `event` makes the last one queued obsolete: the same phase, further on."""
        last = self._events[-1] if self._events else None
        return (
            isinstance(event, StageState)
            and isinstance(last, StageState)
            and event.phase == last.phase
        )

    def close(self, deadline: float) -> None:
        with self._ready:
            self._deadline = deadline
            self._ready.notify()

    def _take(self) -> bytes | None:
        """The next event's frame; waits for one; None when closed and empty."""
        with self._ready:
            while not (self._events or self._latest or self._deadline is not None):
                self._ready.wait()
            if self._events:
                event = self._events.popleft()
                self._notices -= isinstance(event, Notice)
            elif self._latest:
                event = self._latest.popitem()[1]
            else:
                return None
            # Here, and not where it is sent: the epoch may change in between.
            return encode(EventEnvelope(PROTOCOL_VERSION, self._epoch, self._rank, event))

    def run(self, push: zmq.Socket[bytes]) -> None:
        """Send until closed: then what is left, as far as the deadline allows."""
        while (frame := self._take()) is not None:
            while not (sent := _sent(push, frame)) and self._left_s() > 0:
                pass  # the client reads slowly, or is gone: the owners' watch tells these apart
            if not sent:
                break
        push.close(linger=int(max(0.0, self._left_s()) * 1000))

    def _left_s(self) -> float:
        return 1.0 if self._deadline is None else self._deadline - time.monotonic()


def _sent(push: zmq.Socket[bytes], frame: bytes) -> bool:
    try:
        push.send(frame)
    except zmq.Again:
        return False
    return True
