"""How quantized weights are stored: what the loader makes and the planner counts. Torch-free."""

from __future__ import annotations

INT4_GROUP = 32
"""Weights of one output that share a scale and a zero."""
INT4_OUTPUTS = 16
"""The int4 kernel takes outputs by so many."""


def fits_int4(n_out: int, n_in: int) -> bool:
    """Whether a linear layer can have int4 weights; others get int8."""
    return n_out % INT4_OUTPUTS == 0 and n_in % INT4_GROUP == 0


def linear_bytes(n_out: int, n_in: int, *, bias: bool, bits: int) -> int:
    """What a linear layer of the decoder takes once it is quantized to 8 or 4 bits.

    `lm_head` and the heads are never below 8.
    """
    rest = 4 * n_out if bias else 0
    if bits == 4 and fits_int4(n_out, n_in):
        return n_out * n_in // 2 + 4 * n_out * (n_in // INT4_GROUP) + rest
    return n_out * n_in + 4 * n_out + rest
