"""Micro-batches through the stages of a replica and back (1F1B, Narayanan et al. 2021).

Every stage reads the same samples, so each knows the shapes of what it receives: hidden states and
their gradients travel bare, float32 [rows, hidden_size], and no length need be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from engine.model.llama import Rows
from engine.model.medusa import MedusaLlamaForCausalLM
from engine.training.mesh import Mesh, peers

Tokens = tuple[Tensor, Rows]
Loss = Callable[[int, Tensor], Tensor]
"""Loss of micro-batch i from its normed hidden states; called on the last stage."""


def schedule(stage: int, stages: int, count: int) -> Iterator[tuple[bool, int]]:
    """What a stage does with `count` micro-batches: (is_forward, micro-batch), in order.

    At most `stages - stage` micro-batches are held at a time; alone, a stage holds one.
    """
    ahead = min(stages - 1 - stage, count)
    for index in range(ahead):
        yield True, index
    for index in range(count - ahead):
        yield True, ahead + index
        yield False, index
    for index in range(count - ahead, count):
        yield False, index


class Pipeline:
    """One stage of a replica."""

    def __init__(
        self, model: MedusaLlamaForCausalLM, mesh: Mesh, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model, self.mesh, self.device, self.dtype = model, mesh, device, dtype
        self.width = model.config.hidden_size
        # Not the run's: what learns is float32 whatever is computed in.
        self.model_dtype = next(model.model.parameters()).dtype
        gloo = mesh.world.size > 1 and dist.get_backend() == "gloo"
        self.wire = torch.device("cpu") if gloo else device
        self._sending: list[tuple[dist.Work, Tensor]] = []

    def autocast(self) -> torch.autocast:
        """Computes in the run's dtype; weights and gradients stay float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def train(self, batches: Sequence[Tokens], loss: Loss) -> None:
        """Forward and backward of all micro-batches; gradients add up in the parameters."""
        mesh = self.mesh
        held: dict[int, tuple[Tensor, Tensor]] = {}
        for is_forward, index in schedule(mesh.stage, mesh.pp, len(batches)):
            if is_forward:
                x = self._enter(batches[index])
                if not mesh.first:
                    x.requires_grad_(True)
                with self.autocast():
                    out = self.model(x, batches[index][1])
                    if mesh.last:
                        out = loss(index, out)
                if not mesh.last:
                    self._send(out.detach(), mesh.stage + 1, mesh.forward)
                held[index] = x, out
            else:
                x, out = held.pop(index)
                grad = None
                if not mesh.last:
                    grad = self._receive(len(out), mesh.stage + 1, mesh.backward)
                torch.autograd.backward(out, grad)
                if not mesh.first:
                    assert x.grad is not None
                    self._send(x.grad, mesh.stage - 1, mesh.backward)
        self._flush()

    def forward(self, batches: Sequence[Tokens], finish: Callable[[int, Tensor], None]) -> None:
        """Forward alone, without gradients; `finish` gets the last stage's hidden states."""
        for index, batch in enumerate(batches):
            with torch.no_grad(), self.autocast():
                out = self.model(self._enter(batch), batch[1])
            if self.mesh.last:
                finish(index, out)
            else:
                self._send(out, self.mesh.stage + 1, self.mesh.forward)
        self._flush()

    def _enter(self, batch: Tokens) -> Tensor:
        tokens, _ = batch
        if self.mesh.first:
            return tokens
        return self._receive(len(tokens), self.mesh.stage - 1, self.mesh.forward)

    def _send(self, tensor: Tensor, stage: int, group: dist.ProcessGroup | None) -> None:
        """Send without waiting: both neighbours may be sending to each other."""
        wire = tensor.to(self.wire, torch.float32).contiguous()
        with peers():
            work = dist.isend(wire, self.mesh.peer(stage), group=group)
        assert work is not None
        self._sending.append((work, wire))

    def _receive(self, rows: int, stage: int, group: dist.ProcessGroup | None) -> Tensor:
        wire = torch.empty(rows, self.width, device=self.wire)
        with peers():
            dist.recv(wire, self.mesh.peer(stage), group=group)
        return wire.to(self.device, self.model_dtype)

    def _flush(self) -> None:
        with peers():
            for work, _ in self._sending:
                work.wait()
        self._sending.clear()
