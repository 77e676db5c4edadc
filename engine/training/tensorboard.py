"""TensorBoard event files, written without TensorBoard.

Format: TFRecord (tensorflow.org/tutorials/load_data/tfrecord): length uint64, its masked CRC-32C,
the bytes, their masked CRC-32C; each record is a protocol buffer `tensorflow.Event`
(event.proto, summary.proto), of which scalars need five fields.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _table()


class EventWriter:
    """Appends scalars to a file of its own in `folder`.

    Args:
        queue_size: points that are held back at most before they are written.
    """

    def __init__(self, folder: Path, queue_size: int = 50) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        self._queue_size = queue_size
        self._held: list[bytes] = []
        self._append(_double(1, now) + _bytes(3, b"brain.Event:2"))
        self.flush()

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """A point of each curve in `scalars`."""
        values = b"".join(
            _bytes(1, _bytes(1, tag.encode()) + _key(2, 5) + struct.pack("<f", value))
            for tag, value in scalars.items()
        )
        self._append(_double(1, time.time()) + _key(2, 0) + _varint(step) + _bytes(5, values))
        if len(self._held) >= self._queue_size:
            self.flush()

    def flush(self) -> None:
        """Write what is held back."""
        with self._path.open("ab") as file:
            file.write(b"".join(self._held))
        self._held.clear()

    def _append(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        self._held.append(length + _checksum(length) + event + _checksum(event))


def _checksum(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return struct.pack("<I", masked)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _bytes(field: int, data: bytes) -> bytes:
    return _key(field, 2) + _varint(len(data)) + data


def _double(field: int, number: float) -> bytes:
    return _key(field, 1) + struct.pack("<d", number)
