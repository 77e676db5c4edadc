"""Torch tensors in safetensors files: reading one, and entries to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.safetensors_file import Entry, Stored
from engine.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_of(path: Path, stored: Stored) -> torch.dtype:
    """The dtype of the tensor `stored` in `path`; CheckpointError when it is not supported."""
    if stored.dtype not in DTYPES:
        raise CheckpointError(f"{path}: numbers of kind {stored.dtype} are not supported")
    return DTYPES[stored.dtype]


def read_tensor(path: Path, stored: Stored) -> Tensor:
    """The tensor `stored` in `path`, read into memory of its own.

    Read, not mapped: pages of a mapped file would count as this process's memory beside the copy
    that becomes the parameter.

    Raises:
        CheckpointError: the file cannot be read, or holds a kind of numbers that is not supported.
    """
    dtype = dtype_of(path, stored)
    data = torch.empty(stored.end - stored.start, dtype=torch.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(stored.start)
            view = data.numpy().data
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{path}: cut short while it was read")
                done += count
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return data.view(dtype).reshape(stored.shape)


def tensor_entry(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, load: Callable[[], Tensor]
) -> Entry:
    """An entry for the tensor that `load` gives when its turn comes, converted to `dtype`."""

    def data() -> memoryview:
        tensor = load().detach().to("cpu", dtype).contiguous()
        return tensor.reshape(-1).view(torch.uint8).numpy().data

    return Entry(name, NAMES[dtype], shape, data)
