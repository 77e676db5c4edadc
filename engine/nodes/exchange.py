"""Where the stages of several machines leave their addresses for each other.

Answers what `engine/pipeline/exchange.py` asks. torch's own store for this would listen on every
interface, and anybody could write into it; this one is reached over the queue only.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

import msgspec

from engine.protocol import decoded

Asker = TypeVar("Asker", bound=Hashable)


class Put(msgspec.Struct, frozen=True, tag=True):
    """Leave a value; overwrites one that is there."""

    key: str
    value: bytes


class Get(msgspec.Struct, frozen=True, tag=True):
    """Answered with the values of all `keys` as soon as every one of them is there."""

    keys: tuple[str, ...]


Request = Put | Get
_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(Request)
_values_decoder = msgspec.msgpack.Decoder(tuple[bytes, ...])


def encode_request(request: Request) -> bytes:
    """The frame of a request."""
    return _encoder.encode(request)


def decode_values(frame: bytes) -> tuple[bytes, ...]:
    """The values in an answer; raises msgspec.DecodeError."""
    return _values_decoder.decode(frame)


class Exchange(Generic[Asker]):
    """The values of one launch."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._waiting: dict[Asker, tuple[str, ...]] = {}

    def handle(self, asker: Asker, frame: bytes) -> list[tuple[Asker, bytes]]:
        """Take a request; the answers that are due now, and to whom. A damaged one gets none."""
        request = decoded(_request_decoder, frame)
        if request is None:
            return []
        if isinstance(request, Get):
            self._waiting[asker] = request.keys
            return self._due()
        self._values[request.key] = request.value
        return [(asker, _encoder.encode(())), *self._due()]

    def _due(self) -> list[tuple[Asker, bytes]]:
        ready = [
            asker
            for asker, keys in self._waiting.items()
            if all(key in self._values for key in keys)
        ]
        return [
            (asker, _encoder.encode([self._values[key] for key in self._waiting.pop(asker)]))
            for asker in ready
        ]
