"""How rows of hidden states travel between stages: as they are, or rounded for a slow link."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LinkDtype = Literal["exact", "bfloat16", "int8"]
SCALE_BYTES = 4


class Wire:
    """Rows [n, width] of `dtype` to bytes and back; each row by itself, whatever is beside it.

    `exact` copies them. `bfloat16` rounds to 8 bits of mantissa. `int8` has a float32 scale for
    each row, the largest magnitude over 127, and rounds to the nearest multiple; scales come first.
    """

    def __init__(self, kind: LinkDtype, width: int, dtype: torch.dtype) -> None:
        self.kind, self.width, self.dtype = kind, width, dtype
        stored = {"exact": dtype.itemsize, "bfloat16": 2, "int8": 1}[kind]
        self.row_bytes = stored * width + (SCALE_BYTES if kind == "int8" else 0)

    def put(self, hidden: Tensor, target: Tensor) -> None:
        """Write rows into `target`, uint8 [n · row_bytes]."""
        rows = len(hidden)
        if self.kind != "int8":
            dtype = torch.bfloat16 if self.kind == "bfloat16" else self.dtype
            target.view(dtype).view(rows, self.width).copy_(hidden)
            return
        values = hidden.float()
        scales = values.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
        split = rows * SCALE_BYTES
        target[:split].view(torch.float32).view(rows, 1).copy_(scales)
        target[split:].view(torch.int8).view(rows, self.width).copy_((values / scales).round())

    def take(self, source: Tensor, rows: int) -> Tensor:
        """The rows in `source`, uint8 [rows · row_bytes], as [rows, width] of `dtype`.

        `exact` gives a view of it.
        """
        if self.kind == "exact":
            return source.view(self.dtype).view(rows, self.width)
        if self.kind == "bfloat16":
            return source.view(torch.bfloat16).view(rows, self.width).to(self.dtype)
        split = rows * SCALE_BYTES
        scales = source[:split].view(torch.float32).view(rows, 1)
        values = source[split:].view(torch.int8).view(rows, self.width)
        return (values.float() * scales).to(self.dtype)
