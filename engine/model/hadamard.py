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
    half = 1
    while half < block:
        low, high = x.unflatten(-1, (-1, 2, half)).unbind(dim=-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        half *= 2
    return x
