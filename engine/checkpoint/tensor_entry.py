"""Torch tensors as entries of a safetensors file."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.checkpoint.safetensors_file import Entry

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def tensor_entry(name: str, load: Callable[[], Tensor], dtype: torch.dtype | None = None) -> Entry:
    """An entry for the tensor that `load` gives: called once now, for its shape and dtype, and
    again when its bytes are written.

    `dtype` converts a floating-point tensor.
    """
    like = load()
    if dtype is None or not like.is_floating_point():
        dtype = like.dtype

    def data() -> memoryview:
        return load().to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data

    return Entry(name, DTYPE_NAMES[dtype], tuple(like.shape), data)
