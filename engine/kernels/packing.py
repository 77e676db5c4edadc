"""Quantized modules as the kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.kernels.arena import Arena
from engine.kernels.native import PackedLinear, pack
from engine.model.quantize import QuantizedLinear


def take_weights(module: nn.Module) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Weight, scale, bias and block of a quantized layer, which gives its weight away."""
    assert isinstance(module, QuantizedLinear)
    weight, module.weight = module.weight, torch.empty(0, dtype=torch.int8)
    return weight, module.scale, module.bias, module.block


def pack_module(module: nn.Module, arena: Arena) -> PackedLinear:
    """A quantized layer as the kernels read it."""
    return pack(*take_weights(module), arena=arena)
