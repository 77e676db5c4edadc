"""A machine's connection to the first one: encrypted, and known by the join token on both ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import zmq
from zmq.utils.monitor import recv_monitor_message

from engine.endpoint import waiting_frames
from engine.nodes.address import Address
from engine.nodes.messages import MAX_BYTES, ToFirst, ToNode, decode_to_node, encode
from engine.nodes.token import JoinToken

CONNECT_MS = 1000
RETRY_MS = 200
REFUSALS = 2
"""A connection may also break by chance while keys are exchanged."""
EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
)
FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_DISCONNECTED,
)


class Line:
    """One connection, tried until it stands. A new one for every time that a seat is asked for:
    what the last one still had to deliver is gone with it.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: Address, token: JoinToken
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.curve_serverkey = token.server_key
        self.socket.curve_publickey, self.socket.curve_secretkey = token.client_keys
        self.socket.immediate = True  # nothing is kept for a connection that does not stand
        self.socket.linger = 0
        self.socket.ipv6 = ":" in address.ip
        self.socket.set(zmq.CONNECT_TIMEOUT, CONNECT_MS)
        self.socket.reconnect_ivl = self.socket.reconnect_ivl_max = RETRY_MS
        self.socket.heartbeat_ivl, self.socket.heartbeat_timeout = 1000, 3000
        self.socket.maxmsgsize = MAX_BYTES
        self.socket.set_hwm(0)
        self.monitor = self.socket.get_monitor_socket(EVENTS)
        self._refusals = 0
        self._shaking = False
        self.socket.connect(address.endpoint)

    def send(self, message: ToFirst) -> None:
        """Send it if the connection stands; never blocks."""
        with suppress(zmq.ZMQError):
            self.socket.send(encode(message), zmq.NOBLOCK)

    def received(self) -> Iterator[ToNode]:
        """What has arrived."""
        for frame in waiting_frames(self.socket):
            if (message := decode_to_node(frame)) is not None:
                yield message

    def refused(self) -> bool:
        """Whether the other side does not take the token; reads what the monitor has to tell."""
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                return True
            if event == zmq.EVENT_CONNECTED:
                self._shaking = True
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._shaking = False
                self._refusals = 0
            elif event in FAILED and self._shaking:
                self._shaking = False
                self._refusals += 1
        return self._refusals >= REFUSALS

    def close(self, linger_ms: int = 0) -> None:
        """Give it up; what was just sent has so long to leave."""
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=linger_ms)
