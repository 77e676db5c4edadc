"""What the hub has to do with one launch on the first machine: its sockets, its logs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import zmq

from engine.endpoint import waiting_frames
from engine.logs import node_log, note_exit
from engine.nodes.exchange import Exchange
from engine.nodes.messages import Exit
from engine.paths import make_private
from engine.protocol import NODE_PIDS, PROTOCOL_VERSION, EventEnvelope, ProcessEnded, encode
from engine.queue_client import CLIENT_RANK

Asker = tuple[bytes, bytes]
"""Connection of the machine (empty for this one), and of the process there."""


class Attached:
    """One launch, as the other machines have to do with it. For the hub's thread only.

    Args:
        events, commands: addresses of the client's sockets.
        exchange: address for the workers here to ask at.
        log_dir: of the launch.
    """

    commands: zmq.Socket[bytes]
    exchange: zmq.Socket[bytes]

    def __init__(self, events: str, commands: str, exchange: str, log_dir: Path) -> None:
        self._addresses = events, commands, exchange
        self._log_dir = log_dir
        self._values: Exchange[Asker] = Exchange()

    def open(self, context: zmq.Context[zmq.Socket[bytes]], poller: zmq.Poller) -> None:
        """Connect to the client as a worker would, and be there for the workers."""
        events, commands, exchange = self._addresses
        self._events = context.socket(zmq.PUSH)
        self._events.set_hwm(0)
        self._events.connect(events)
        self.commands = context.socket(zmq.SUB)
        self.commands.set_hwm(0)
        self.commands.subscribe(b"")
        self.commands.connect(commands)
        self.exchange = context.socket(zmq.ROUTER)
        self.exchange.set_hwm(0)
        self.exchange.bind(exchange)
        poller.register(self.commands, zmq.POLLIN)
        poller.register(self.exchange, zmq.POLLIN)

    def close(self, poller: zmq.Poller) -> None:
        """Let go of the client."""
        poller.unregister(self.commands)
        poller.unregister(self.exchange)
        for socket in (self._events, self.commands, self.exchange):
            socket.close(linger=0)

    def event(self, frame: bytes) -> None:
        """Give the client a frame of a worker."""
        with suppress(zmq.ZMQError):
            self._events.send(frame, zmq.NOBLOCK)

    def ended(self, node: int, pid: int) -> None:
        """Tell the client of the end of a worker."""
        gone = ProcessEnded(node * NODE_PIDS + pid)
        self.event(encode(EventEnvelope(PROTOCOL_VERSION, 0, CLIENT_RANK, gone)))

    def exited(self, node: int, exit_: Exit) -> None:
        """Note how one ended, where the client looks."""
        pid = node * NODE_PIDS + exit_.pid
        note_exit(str(self._log_dir), exit_.epoch, exit_.rank, pid, exit_.code)

    def log(self, rank: int, data: bytes) -> None:
        """Add to the log of a rank."""
        path = node_log(self._log_dir, rank)
        with suppress(OSError):  # a full disk
            make_private(path.parent)
            with path.open("ab") as file:
                file.write(data)

    def asked_here(self) -> list[tuple[Asker, bytes]]:
        """Take what workers of this machine ask; all answers that are due now."""
        answers: list[tuple[Asker, bytes]] = []
        for asker in waiting_frames(self.exchange):
            frame = self.exchange.recv()  # the other half of the same message
            answers += self.asked((b"", asker), frame)
        return answers

    def asked(self, asker: Asker, frame: bytes) -> list[tuple[Asker, bytes]]:
        """Take a request; all answers that are due now."""
        return self._values.handle(asker, frame)

    def answer_here(self, asker: bytes, frame: bytes) -> None:
        """Answer a worker of this machine; one that has ended gets none."""
        with suppress(zmq.ZMQError):
            self.exchange.send_multipart([asker, frame], zmq.NOBLOCK)
