"""The optimizer over the shards of flat buffers: clipping, rates per role, states to save."""

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
    """AdamW (Loshchilov and Hutter 2019) or SGD over this rank's pieces.

    As in Megatron, weight decay spares what has one dimension: norms and biases.
    """

    def __init__(self, buffers: Sequence[FlatBuffer], options: OptimizerOptions) -> None:
        self.buffers = buffers
        self.options = options
        self.pieces: dict[Role, list[Piece]] = {role: [] for role in Role}
        for buffer in buffers:
            for piece in buffer.pieces:
                self.pieces[role_of(piece.name)].append(piece)
        self._torch = self._make()

    def _make(self) -> torch.optim.Optimizer | None:
        groups = []
        for role, pieces in self.pieces.items():
            for decays in (True, False):
                chosen = [piece.value for piece in pieces if (len(piece.shape) > 1) == decays]
                decay = self.options.weight_decay if decays else 0.0
                if chosen:
                    groups.append({"params": chosen, "weight_decay": decay, "role": role})
        o = self.options
        if not groups:
            return None  # a stage of a frozen base
        if o.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=o.sgd_momentum)
        betas = (o.adam_beta1, o.adam_beta2)
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=o.adam_eps)

    def reduce(self, roles: frozenset[Role]) -> Tensor:
        """Add up the gradients over the replicas.

        Returns the sum of squares of those that this rank answers for, float64 []; all ranks'
        together are the square of the gradient's norm.
        """
        total = torch.zeros((), dtype=torch.float64)
        for buffer in self.buffers:
            buffer.reduce()
            if buffer.is_owner:
                for piece in buffer.pieces:
                    if role_of(piece.name) in roles:
                        total += piece.grad.double().square().sum().cpu()
        return total

    def step(self, rates: Mapping[Role, float], grad_norm: float) -> None:
        """Clip by the global norm and update the parameters of the roles in `rates`."""
        clip = self.options.clip_grad
        factor = min(1.0, clip / (grad_norm + 1e-6)) if clip else 1.0
        for role, pieces in self.pieces.items():
            for piece in pieces:
                # The optimizer leaves alone what has no gradient.
                piece.value.grad = piece.grad.mul_(factor) if role in rates else None
        if self._torch is not None:
            for group in self._torch.param_groups:
                group["lr"] = rates.get(group["role"], 0.0)
            self._torch.step()
        for buffer in self.buffers:
            buffer.gather()

    def zero_grads(self) -> None:
        """Before the first backward of a step."""
        for buffer in self.buffers:
            buffer.zero_grads()

    def squared_params(self) -> Tensor:
        """As the result of `reduce`, of the parameters."""
        total = torch.zeros((), dtype=torch.float64)
        for buffer in self.buffers:
            if buffer.is_owner:
                for piece in buffer.pieces:
                    total += piece.value.detach().double().square().sum().cpu()
        return total

    def owned(self) -> list[Piece]:
        """The pieces that this rank answers for: over all ranks, everything once."""
        return [piece for buffer in self.buffers if buffer.is_owner for piece in buffer.pieces]

    def every(self) -> list[Piece]:
        """The pieces that this rank updates."""
        return [piece for buffer in self.buffers for piece in buffer.pieces]

    def states(self, piece: Piece) -> tuple[dict[str, Tensor], int]:
        """The states of a piece, each float32 [n], and how often it was updated."""
        held = {} if self._torch is None else self._torch.state.get(piece.value, {})
        tensors = {
            name: value
            for name, value in held.items()
            if isinstance(value, Tensor) and value.shape == piece.value.shape and name != "step"
        }
        return tensors, int(held.get("step", 0))

    def set_states(self, piece: Piece, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Put back what `states` gave."""
        if self._torch is None or not tensors:
            return
        state: dict[str, Tensor] = {name: tensor.clone() for name, tensor in tensors.items()}
        if self.options.optimizer == "adam":
            state["step"] = torch.tensor(float(steps))
        self._torch.state[piece.value] = state

    @property
    def state_names(self) -> tuple[str, ...]:
        """The states that the optimizer keeps for each parameter."""
        return ("exp_avg", "exp_avg_sq") if self.options.optimizer == "adam" else ("momentum_buffer",)


def global_norm(squares: Tensor, world: Group) -> float:
    """The norm over all ranks from what each returned by `reduce`."""
    return float(world.sum_(squares.clone()).sqrt())
