"""Hadamard transforms of the inputs of linear layers, so that int8 is enough for them."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 64
"""Larger blocks gain nothing more on SmolLM2."""


def block_of(width: int) -> int:
    """Values that are mixed with each other in rows of so many: a power of two that divides it."""
    return min(width & -width, MOST)


def turn(x: Tensor, block: int) -> Tensor:
    """Each block of a row times the Hadamard matrix (Sylvester's) of that size.

    Single large values are spread over their block. Done twice, it gives x times `block`. Sums are
    taken in the order in which layers.cpp takes them, so that both come to the same bits.

    Args:
        x: float [rows, width], the width a multiple of the block; block: a power of two.
    """
    shape = x.shape
    # A block's values apart from each other, the blocks side by side: sums of whole rows.
    x = x.reshape(x.numel() // block, block).t().contiguous()
    half = 1
    while half < block:
        pairs = x.view(block // (2 * half), 2, half, x.shape[-1])
        low, high = pairs.unbind(dim=1)
        mixed = torch.empty_like(pairs)
        torch.add(low, high, out=mixed[:, 0])
        torch.sub(low, high, out=mixed[:, 1])
        x = mixed.view(block, -1)
        half *= 2
    return x.t().reshape(shape)
