"""Memory on huge pages for weights that are read in every step.

Reading weights from memory is most of a step, and with pages of 4 KB the processor spends a third
of that time on finding the pages.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

import torch
from torch import Tensor

HUGE = 2 << 20
CHUNK = 16 * HUGE
LINE = 64


class Arena:
    """Holds copies of tensors; they live as long as one of them, or the arena, does.

    Where the system has no huge pages, they lie on ordinary ones.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def keep(self, tensor: Tensor) -> Tensor:
        """A contiguous copy, aligned to cache lines."""
        size = (tensor.nbytes + LINE - 1) // LINE * LINE
        if len(self._free) < size:
            self._free = _pages(max(CHUNK, size))
        part, self._free = self._free[: tensor.nbytes], self._free[size:]
        copy = part.view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)


def _pages(size: int) -> Tensor:
    # Private: shared pages are small ones.
    pages = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % HUGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)[start : start + size]
