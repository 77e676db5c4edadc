"""Messages between the ranks that share a layer, with their gradients (Megatron's f and g)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.training.mesh import Group


def copy_in(x: Tensor, group: Group) -> Tensor:
    """The same tensor; its gradients are added up over the ranks."""
    return _CopyIn.apply(x, group) if group.size > 1 else x


def sum_out(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks; its gradient is the same on each."""
    return _SumOut.apply(x, group) if group.size > 1 else x


def gather_rows(x: Tensor, group: Group) -> Tensor:
    """All ranks' rows under one another; gradients are added up, each rank gets its rows'."""
    return _GatherRows.apply(x, group, True) if group.size > 1 else x


def repeat_rows(x: Tensor, group: Group) -> Tensor:
    """All ranks' rows under one another, where each rank then does the same with them."""
    return _GatherRows.apply(x, group, False) if group.size > 1 else x


def scatter_rows(x: Tensor, group: Group) -> Tensor:
    """This rank's rows of the sum over the ranks; gradients are those of all rows."""
    return _ScatterRows.apply(x, group) if group.size > 1 else x


def _scattered(x: Tensor, group: Group) -> Tensor:
    part = x.new_empty(len(x) // group.size, *x.shape[1:])
    group.reduce_scatter(x.contiguous(), part)
    return part


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.sum_(grads[0].contiguous().clone()), None


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.sum_(x.contiguous().clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, adds_up: bool) -> Tensor:
        ctx.group, ctx.adds_up = group, adds_up
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.adds_up:
            return _scattered(grads[0], ctx.group), None, None
        return grads[0].chunk(ctx.group.size)[ctx.group.index], None, None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _scattered(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_gather(grads[0]), None
