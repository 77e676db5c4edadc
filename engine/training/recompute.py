"""Full recomputing (Chen et al. 2016): of some layers only the input is kept for the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute(
    layers: Sequence[nn.Module], method: Literal["uniform", "block"], num_layers: int
) -> None:
    """Have layers computed again in the backward, in place; names and parameters stay.

    Args:
        method: uniform: units of `num_layers` layers, each of which keeps its input alone; block:
            the first `num_layers` layers one by one, the others keep all.
    """
    step = num_layers if method == "uniform" else 1
    stop = len(layers) if method == "uniform" else min(num_layers, len(layers))
    for start in range(0, stop, step):
        _as_one(layers[start : start + step])


def _as_one(layers: Sequence[nn.Module]) -> None:
    """The first layer does the work of all, the others pass on what they get."""
    originals = [layer.forward for layer in layers]

    def run(x: Tensor, *args: object) -> Tensor:
        for forward in originals:
            x = forward(x, *args)
        return x

    def first(x: Tensor, *args: object) -> Tensor:
        return checkpoint(run, x, *args, use_reentrant=False, preserve_rng_state=False)

    layers[0].forward = first
    for layer in layers[1:]:
        layer.forward = _pass_on


def _pass_on(x: Tensor, *args: object) -> Tensor:
    return x
