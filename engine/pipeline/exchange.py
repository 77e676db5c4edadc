"""torch's store over the queue, by which stages on several machines find each other."""

from __future__ import annotations

import threading
from datetime import timedelta

import torch.distributed as dist
import zmq

from engine.nodes.exchange import Get, Put, Request, decode_values, encode_request


class QueueStore(dist.Store):  # type: ignore[name-defined]
    """A store whose values the first machine keeps; see engine/nodes/exchange.py.

    Args:
        address: of the socket on this machine that passes requests on.
        prefix: of all keys; another one for each process group.
        timeout: how long `get` waits.
    """

    def __init__(self, address: str, prefix: str, timeout: timedelta) -> None:
        super().__init__()
        self._prefix = prefix
        self._timeout = timeout
        self._lock = threading.Lock()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(address)

    def set(self, key: str, value: bytes | str) -> None:
        """Leave a value."""
        raw = value.encode() if isinstance(value, str) else bytes(value)
        self._ask(Put(self._prefix + key, raw), self._timeout)

    def get(self, key: str) -> bytes:
        """A value, as soon as it is there; raises RuntimeError when that takes too long."""
        return self._ask(Get((self._prefix + key,)), self._timeout)[0]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all are there; raises as `get`."""
        self._ask(Get(tuple(self._prefix + key for key in keys)), timeout or self._timeout)

    def _ask(self, request: Request, timeout: timedelta) -> tuple[bytes, ...]:
        limit = min(int(timeout.total_seconds() * 1000), 2**31 - 1)
        with self._lock:
            self._socket.send(encode_request(request))
            if not self._socket.poll(limit):
                raise RuntimeError(f"connection timed out: no answer to {request} in {timeout}")
            return decode_values(self._socket.recv())
