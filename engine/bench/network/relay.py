"""Machines that are far from each other: carries Ethernet frames between ports, each after a delay.

Stands in for a bridge where the kernel has no `netem`. It runs in the rig's own namespace, which
is where its rights end: `python -m engine.bench.network.relay MILLISECONDS PORT...`. It says
`ready` once it listens, and ends with its input.
"""

from __future__ import annotations

import errno
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

# From linux/if_ether.h and linux/if_packet.h; Python's socket has none of them.
ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
VNET_HEADER = 10
"""Bytes of struct virtio_net_hdr, which tells of checksums and segments that are yet to be made."""
FRAME = 1 << 17
ADDRESS = 6
QUEUE = 1 << 24
"""Bytes that a port may have waiting in the kernel, either way."""


class Relay:
    """A switch of some ports; what comes in leaves `delay_s` seconds later."""

    def __init__(self, ports: Sequence[str], delay_s: float) -> None:
        self.delay_s = delay_s
        self._sockets = [_open(port) for port in ports]
        self._place: dict[bytes, socket.socket] = {}
        """Where a hardware address was last heard."""
        self._waiting: deque[tuple[float, socket.socket, bytes]] = deque()

    def run(self, until: int) -> None:
        """Carry frames until there is something to read, or an end, in the file descriptor."""
        with selectors.DefaultSelector() as selector:
            for one in self._sockets:
                selector.register(one, selectors.EVENT_READ)
            selector.register(until, selectors.EVENT_READ)
            while True:
                due = self._waiting[0][0] - time.monotonic() if self._waiting else None
                for key, _ in selector.select(None if due is None else max(0.0, due)):
                    if key.fd == until:
                        return
                    assert isinstance(key.fileobj, socket.socket)
                    self._take(key.fileobj)
                self._pass_on()

    def _take(self, source: socket.socket) -> None:
        frame = source.recv(FRAME)
        self._place[_address(frame, ADDRESS)] = source
        self._waiting.append((time.monotonic() + self.delay_s, source, frame))

    def _pass_on(self) -> None:
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            _, source, frame = self._waiting.popleft()
            target = self._place.get(_address(frame, 0))
            for one in self._sockets if target is None else [target]:
                if one is not source:
                    _send(one, frame)


def _address(frame: bytes, at: int) -> bytes:
    return frame[VNET_HEADER + at : VNET_HEADER + at + ADDRESS]


def _send(port: socket.socket, frame: bytes) -> None:
    try:
        port.send(frame)
    except OSError as error:
        # As a switch does it whose queue is full; TCP sends it once more.
        if error.errno != errno.ENOBUFS:
            raise


def _open(port: str) -> socket.socket:
    one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    # The kernel hands over segments of up to 64 KiB with their checksums yet to be made, and takes
    # them so: neither is lost on the way.
    one.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    one.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, QUEUE)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, QUEUE)
    one.bind((port, ETH_P_ALL))
    return one


class Delay:
    """A relay in a process of its own, between ports that no bridge joins meanwhile."""

    def __init__(self, ports: Sequence[str], delay_ms: float) -> None:
        words = [sys.executable, "-m", "engine.bench.network.relay", str(delay_ms), *ports]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            self._process.wait()
            raise OSError("the relay did not start")

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def main(words: Sequence[str]) -> None:
    """Carry frames between the named ports until the input ends."""
    relay = Relay(words[1:], float(words[0]) / 1000.0)
    print("ready", flush=True)
    relay.run(sys.stdin.fileno())


if __name__ == "__main__":
    main(sys.argv[1:])
