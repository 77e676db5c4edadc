"""The safetensors container without torch: reading a header, checking a file, writing shards.

Format (safetensors documentation): 8 bytes little-endian length N, N bytes of JSON that map
each name to {dtype, shape, data_offsets}, then the tensors' bytes without holes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
ITEM_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `dtype` by the format's name, `start` and `end` in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_index(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name, after checking that the file is whole.

    Raises:
        CheckpointError: naming the file when it is missing, damaged or cut short.
    """
    try:
        with path.open("rb") as file:
            header, start = _read_header(file, path)
            size = file.seek(0, 2)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    header.pop("__metadata__", None)
    try:
        stored = {name: _stored(entry, start) for name, entry in header.items()}
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: damaged: its header describes no tensors") from None
    end = max((tensor.end for tensor in stored.values()), default=start)
    if size != end:
        what = "cut short" if size < end else "too long"
        raise CheckpointError(f"{path}: {what}: {size} bytes instead of {end}")
    return stored


def _stored(entry: Any, start: int) -> Stored:
    begin, end = map(int, entry["data_offsets"])
    shape = tuple(map(int, entry["shape"]))
    dtype = str(entry["dtype"])
    expected = ITEM_BYTES.get(dtype, 0) * math.prod(shape)
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise ValueError("offsets out of order")
    if dtype in ITEM_BYTES and end - begin != expected:
        raise ValueError("offsets and shape disagree")
    return Stored(dtype, shape, start + begin, start + end)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor name; raises as `read_index`."""
    return {name: tensor.shape for name, tensor in read_index(path).items()}


def read_integers(path: Path, name: str) -> tuple[int, ...]:
    """The values of the integer tensor `name`; raises as `read_index`."""
    tensor = read_index(path)[name]
    code = {"I64": "q", "I32": "i"}.get(tensor.dtype)
    if code is None:
        raise CheckpointError(f"{path}: tensor {name} must hold integers, not {tensor.dtype}")
    with path.open("rb") as file:
        file.seek(tensor.start)
        data = file.read(tensor.end - tensor.start)
    return struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data)


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The header's entries, and the offset of the first tensor byte."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: cut short: {len(prefix)} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: not a safetensors file")
    text = file.read(length)
    if len(text) < length:
        raise CheckpointError(f"{path}: cut short inside its header")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: damaged: its header is not JSON")
    return header, 8 + length


@dataclass(frozen=True)
class Entry:
    """A tensor to write: `load` gives its bytes (little-endian, row-major) when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], bytes | memoryview]

    @property
    def nbytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


def write_sharded(
    folder: Path,
    entries: Sequence[Entry],
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    written: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write `entries` to `folder` in Hugging Face's naming: one file, or shards and an index.

    One tensor is in memory at a time. `written(done, total)` is called after each.
    """
    shards = list(_split(entries, shard_bytes))
    names = [SINGLE_FILE]
    if len(shards) > 1:
        total = len(shards)
        names = [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
        weight_map = {
            entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard
        }
        metadata = {"total_size": sum(entry.nbytes for entry in entries)}
        index = {"metadata": metadata, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    done = 0
    for name, shard in zip(names, shards, strict=True):
        for _ in write_file(folder / name, shard):
            done += 1
            written(done, len(entries))


def _split(entries: Sequence[Entry], shard_bytes: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    used = 0
    for entry in entries:
        if shard and used + entry.nbytes > shard_bytes:
            yield shard
            shard, used = [], 0
        shard.append(entry)
        used += entry.nbytes
    yield shard


def write_file(path: Path, entries: Sequence[Entry]) -> Iterator[Entry]:
    """Write one file; yields each entry once its bytes are out, so it must be iterated."""
    # Wider items first keep every tensor aligned to its item size.
    ordered = sorted(entries, key=lambda entry: -ITEM_BYTES[entry.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    offset = 0
    for entry in ordered:
        span = [offset, offset + entry.nbytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in ordered:
            data = entry.load()
            if memoryview(data).nbytes != entry.nbytes:
                raise ValueError(f"{entry.name}: wrong number of bytes for its shape")
            file.write(data)
            yield entry
