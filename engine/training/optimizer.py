"""The optimizer over the shards of flat buffers: clipping, rates per role, states to save.

The few lines of AdamW and SGD are written out: torch.optim loads the whole compiler, which costs
every rank two seconds, and knows nothing of pieces and roles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from engine.training.flat import FlatBuffer, Piece
from engine.training.mesh import Group


class Role(Enum):
    """What a parameter is part of; each has a learning rate of its own."""

    BASE = "base"
    HEADS = "heads"


def role_of(name: str) -> Role:
    """The role of the parameter `name`."""
    return Role.HEADS if name.startswith("medusa_head.") else Role.BASE


@dataclass(frozen=True)
class OptimizerOptions:
    """The arguments of the optimizer, by their names in training arguments."""

    optimizer: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    sgd_momentum: float = 0.9


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or SGD with momentum over this rank's pieces.

    As in Megatron, weight decay spares what has one dimension: norms and biases.
    """

    def __init__(
        self,
        buffers: Sequence[FlatBuffer],
        options: OptimizerOptions,
        *,
        overlap_gather: bool = False,
    ) -> None:
        self.buffers = buffers
        self.options = options
        self.overlap_gather = overlap_gather
        self.pieces = [piece for buffer in buffers for piece in buffer.pieces]
        """What this rank updates."""
        self.owned = [piece for b in buffers if b.is_owner for piece in b.pieces]
        """What it answers for: over all ranks, everything once."""
        self.updates = dict.fromkeys(Role, 0)
        """How often each role was updated."""
        is_adam = options.optimizer == "adam"
        self.state_names = ("exp_avg", "exp_avg_sq") if is_adam else ("momentum_buffer",)
        self.states = {
            piece: {name: torch.zeros_like(piece.value) for name in self.state_names}
            for piece in self.pieces
        }
        """Per piece the states that go with it, each float32 [n]."""

    def zero_grads(self) -> None:
        """Before the first backward of a step."""
        for buffer in self.buffers:
            buffer.zero_grads()

    def reduce(self, roles: frozenset[Role]) -> Tensor:
        """Add up the gradients over the replicas.

        Returns the sum of squares of those of `roles` that this rank answers for, float64 [];
        over all ranks it is the square of the gradient's norm.
        """
        for buffer in self.buffers:
            buffer.reduce()
        return _squares([piece.grad for piece in self.owned if role_of(piece.name) in roles])

    def expect(self, passes: int) -> None:
        """So many backwards of all parameters are to come before `reduce`."""
        for buffer in self.buffers:
            buffer.expect(passes)

    @torch.no_grad()
    def step(self, rates: Mapping[Role, float], grad_norm: float, loss_scale: float = 1.0) -> None:
        """Clip by the global norm and update the parameters of the roles in `rates`.

        loss_scale: of the gradients that `reduce` added up; not of `grad_norm`.
        """
        clip = self.options.clip_grad
        factor = (min(1.0, clip / (grad_norm + 1e-6)) if clip else 1.0) / loss_scale
        update = self._adam if self.options.optimizer == "adam" else self._sgd
        for role in rates:
            self.updates[role] += 1
        for piece in self.pieces:
            role = role_of(piece.name)
            if role in rates:
                decay = self.options.weight_decay if len(piece.shape) > 1 else 0.0
                update(piece, piece.grad.mul_(factor), rates[role], decay)
        for buffer in self.buffers:
            buffer.begin_gather()
        if not self.overlap_gather:
            self.settle()

    def settle(self) -> None:
        """Wait until all parameters are everywhere."""
        for buffer in self.buffers:
            buffer.settle()

    def _adam(self, piece: Piece, grad: Tensor, rate: float, decay: float) -> None:
        o, states, count = self.options, self.states[piece], self.updates[role_of(piece.name)]
        mean, square = states["exp_avg"], states["exp_avg_sq"]
        mean.lerp_(grad, 1 - o.adam_beta1)
        square.mul_(o.adam_beta2).addcmul_(grad, grad, value=1 - o.adam_beta2)
        bias, square_bias = 1 - o.adam_beta1**count, 1 - o.adam_beta2**count
        scale = (square / square_bias).sqrt_().add_(o.adam_eps)
        piece.value.mul_(1 - rate * decay).addcdiv_(mean, scale, value=-rate / bias)

    def _sgd(self, piece: Piece, grad: Tensor, rate: float, decay: float) -> None:
        momentum = self.states[piece]["momentum_buffer"]
        momentum.mul_(self.options.sgd_momentum).add_(grad).add_(piece.value, alpha=decay)
        piece.value.add_(momentum, alpha=-rate)

    def squared_params(self) -> Tensor:
        """As the result of `reduce`, of the parameters."""
        self.settle()
        return _squares([piece.value for piece in self.owned])


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors:
        total += tensor.double().square().sum().cpu()
    return total


def global_norm(squares: Tensor, world: Group) -> float:
    """The norm over all ranks from what each returned by `reduce`."""
    return float(world.sum_(squares.clone()).sqrt())
