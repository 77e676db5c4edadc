"""The client's end of the shared queue.

One thread reads what the workers send, decodes it, and watches their processes; the event loop
gets it in batches. The thread waits until a batch is taken, so a slow loop gets larger batches and
not more calls. What waits is bounded by the requests that are open.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from engine.dropped import DropCount
from engine.endpoint import waiting_frames
from engine.errors import EngineError
from engine.processes import POLL_S, ProcessHandle
from engine.protocol import (
    NODE_PIDS,
    PROTOCOL_VERSION,
    Command,
    CommandEnvelope,
    EventEnvelope,
    ProcessEnded,
    StageState,
    decode_event,
    encode,
)

CLIENT_RANK = -1
"""The rank on notices that the client itself adds to the events."""
LINGER_MS = 200


@dataclass(frozen=True)
class Gone:
    """A watched process has ended."""

    pid: int


Item = EventEnvelope | Gone


class QueueClient:
    """The client's end: binds both sockets, publishes commands, follows events and processes.

    Args:
        events, commands: addresses to bind the PULL and the PUB socket to.
        epoch: the launch; events of another one are dropped.
        world_size: events of a rank outside it are dropped.
        on_batch: called on the event loop with what has arrived, in order. A process's end comes
            before the events that were read together with it.

    Raises EngineError when the sockets cannot be bound.
    """

    def __init__(
        self,
        events: str,
        commands: str,
        *,
        epoch: int,
        world_size: int,
        on_batch: Callable[[list[Item]], None],
    ) -> None:
        self._epoch = self._first_epoch = epoch
        self._world_size = world_size
        self._on_batch = on_batch
        self._loop = asyncio.get_running_loop()
        self._dropped = DropCount("event")
        self._context = zmq.Context()
        self._pull = self._context.socket(zmq.PULL)
        self._pub = self._context.socket(zmq.PUB)
        # Never drop a command: the client bounds how many requests may be open.
        self._pub.set_hwm(0)
        # Nor lose an event: a socket at its limit drops what a worker sent just before its end.
        self._pull.set_hwm(0)
        try:
            self._pull.bind(events)
            self._pub.bind(commands)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise EngineError(f"{events}: cannot be bound: {error}") from None
        self._watched: dict[int, ProcessHandle] = {}
        self._poller = zmq.Poller()
        self._wake_read, self._wake_write = os.pipe()
        self._taken = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._follow, name="jupiter-queue", daemon=True)

    @property
    def dropped(self) -> int:
        """Frames that were malformed, or of another launch."""
        return self._dropped.count

    def start(self, pid: int) -> None:
        """Begin to follow events, and the process `pid`; workers are watched as they report."""
        self._watch(pid)
        self._poller.register(self._pull, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._thread.start()

    def publish(self, command: Command) -> None:
        """Send a command to all workers; from the loop's thread only, never blocks."""
        self._pub.send(encode(CommandEnvelope(PROTOCOL_VERSION, self._epoch, command)))

    def change_epoch(self, epoch: int) -> None:
        """Belong to another epoch from now on; what is still to come of the one before is passed
        over."""
        self._epoch = epoch

    def close(self) -> None:
        """Stop following, and close; idempotent. Commands get a moment to leave."""
        if self._closed:
            return
        self._closed = True
        if self._thread.ident is not None:
            os.write(self._wake_write, b"\0")
            self._taken.set()
            self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)
        for handle in self._watched.values():
            handle.close()
        self._pull.close(linger=0)
        self._pub.close(linger=LINGER_MS)
        self._context.term()

    # --- on the thread ---------------------------------------------------------------------------

    def _follow(self) -> None:
        while True:
            ready = dict(self._poller.poll(self._wait_ms()))
            if self._wake_read in ready:
                return
            arrived = self._arrived()
            # Looked at last and put first: a rank's end goes before its neighbours' complaints.
            batch: list[Item] = [*self._ended(), *arrived]
            if notice := self._dropped.notice():
                batch.append(EventEnvelope(PROTOCOL_VERSION, self._epoch, CLIENT_RANK, notice))
            if batch and not self._hand_over(batch):
                return

    def _wait_ms(self) -> int | None:
        waits = [self._dropped.wait_ms()]
        if any(handle.fd is None for handle in self._watched.values()):
            waits.append(int(POLL_S * 1000))
        return min((wait for wait in waits if wait is not None), default=None)

    def _ended(self) -> list[Gone]:
        ended = [pid for pid, handle in self._watched.items() if handle.gone()]
        for pid in ended:
            handle = self._watched.pop(pid)
            if handle.fd is not None:
                self._poller.unregister(handle.fd)
            handle.close()
        return [Gone(pid) for pid in ended]

    def _arrived(self) -> list[Item]:
        items: list[Item] = []
        for frame in waiting_frames(self._pull):
            envelope = decode_event(frame)
            if envelope is not None and isinstance(envelope.body, ProcessEnded):
                items.append(Gone(envelope.body.pid))
                continue
            if envelope is not None and self._first_epoch <= envelope.epoch < self._epoch:
                continue
            if (
                envelope is None
                or envelope.epoch != self._epoch
                or not 0 <= envelope.rank < self._world_size
            ):
                self._dropped.count += 1
                continue
            items.append(envelope)
            if isinstance(envelope.body, StageState) and 0 < envelope.body.pid < NODE_PIDS:
                items += self._watch(envelope.body.pid)
        return items

    def _watch(self, pid: int) -> list[Gone]:
        """Watch a process from now on; one that has ended already is told at once."""
        if pid not in self._watched:
            try:
                handle = self._watched[pid] = ProcessHandle(pid)
            except OSError:
                return [Gone(pid)]
            if handle.fd is not None:
                self._poller.register(handle.fd, zmq.POLLIN)
        return []

    def _hand_over(self, batch: list[Item]) -> bool:
        """Give a batch to the loop and wait until it is taken; False when the loop has closed."""
        self._taken.clear()
        if self._closed:
            return False
        try:
            self._loop.call_soon_threadsafe(self._take, batch)
        except RuntimeError:
            return False
        self._taken.wait()
        return True

    def _take(self, batch: list[Item]) -> None:
        try:
            if not self._closed:
                self._on_batch(batch)
        finally:
            self._taken.set()
