"""Parameters laid end to end, so that replicas exchange and share them as single tensors (ZeRO-1).

Every rank of a group holds all parameters and their gradients, but updates only its own shard of
them, and keeps optimizer states for that shard alone (Rajbhandari et al. 2020, stage 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.training.mesh import Group


@dataclass(frozen=True, eq=False)
class Piece:
    """The part of one parameter that this rank updates."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """The first of the parameter's elements, counted flat, that belongs to the piece."""
    value: Tensor
    """float32 [n], a view of the flat parameters."""
    grad: Tensor
    """float32 [n], a view of the shard's gradients; summed over the group after `reduce`."""


class FlatBuffer:
    """The parameters that the same ranks hold.

    Args:
        parameters: float32; they become views of one flat tensor, and their `.grad`, where
            backward adds up, views of another.
        group: the ranks that hold them. The gradient of the run is the sum over these.
        sharded: each rank updates its own shard; without it every rank updates everything.
        answers: whether this rank speaks for the buffer, where ranks outside the group have the
            same parameters too.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        group: Group,
        *,
        sharded: bool,
        answers: bool = True,
    ) -> None:
        self.group = group
        self.shards = group.size if sharded else 1
        index = group.index if sharded else 0
        self.is_owner = answers and (sharded or group.index == 0)
        """Whether this rank's pieces count: without shards every rank has the same ones."""
        size = sum(parameter.numel() for parameter in parameters.values())
        length = -(-size // self.shards) if size else 0
        device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self.params = torch.zeros(length * self.shards, device=device)
        self.grads = torch.zeros_like(self.params)
        self.own = slice(index * length, (index + 1) * length)
        self.own_grads = self.grads
        if self.shards > 1:
            self.own_grads = torch.zeros(length, device=device)
        self.pieces: list[Piece] = []
        self.parameters = list(parameters.values())
        self._reducing: Callable[[], None] | None = None
        self._gathering: Callable[[], None] | None = None
        self._to_come = 0
        """Gradients that are to come before the sum can begin; 0 where it waits for `reduce`."""
        at = 0
        for name, parameter in parameters.items():
            self._place(parameter, at)
            self._add_piece(name, parameter, at)
            at += parameter.numel()

    def _place(self, parameter: nn.Parameter, at: int) -> None:
        span = slice(at, at + parameter.numel())
        self.params[span].copy_(parameter.data.reshape(-1))
        parameter.data = self.params[span].view(parameter.shape)
        parameter.requires_grad_(True)
        parameter.grad = self.grads[span].view(parameter.shape)

    def _add_piece(self, name: str, parameter: nn.Parameter, at: int) -> None:
        start, stop = max(at, self.own.start), min(at + parameter.numel(), self.own.stop)
        if start >= stop:
            return
        local = slice(start - self.own.start, stop - self.own.start)
        self.pieces.append(
            Piece(
                name,
                tuple(parameter.shape),
                start - at,
                self.params[start:stop],
                self.own_grads[local],
            )
        )

    def zero_grads(self) -> None:
        """Before the first backward of a step."""
        self.grads.zero_()

    def overlap_reduce(self) -> None:
        """Have the sum over the group begin with the last gradient that `expect` announced."""
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._count)

    def expect(self, passes: int) -> None:
        """So many backwards are to come in this step, in each of which all parameters take part."""
        self._to_come = passes * len(self.parameters)

    def _count(self, parameter: Tensor) -> None:
        if self._to_come:
            self._to_come -= 1
            if not self._to_come:
                self._reducing = self._begin_reduce()

    def _begin_reduce(self) -> Callable[[], None]:
        if self.shards > 1:
            return self.group.begin_reduce_scatter(self.grads, self.own_grads)
        return self.group.begin_sum(self.grads)

    def reduce(self) -> None:
        """Add up the gradients over the group; this rank's pieces then have theirs."""
        if not len(self.params):
            return  # a stage of a frozen base
        end = self._reducing or self._begin_reduce()
        end()
        self._reducing, self._to_come = None, 0

    def begin_gather(self) -> None:
        """After an update of the pieces: every rank is to get all parameters; see `settle`."""
        if self.shards > 1 and len(self.params):
            self._gathering = self.group.begin_all_gather(self.params)

    def settle(self) -> None:
        """Wait until the parameters are there that `begin_gather` began to fetch."""
        if self._gathering is not None:
            self._gathering()
            self._gathering = None

    def gather(self) -> None:
        """After an update of the pieces: every rank gets all parameters."""
        self.begin_gather()
        self.settle()
