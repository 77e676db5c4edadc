"""Micro-batches through the stages of a replica and back.

Every stage reads the same samples, so each knows the shapes of what it receives: hidden states and
their gradients travel bare, float32 [rows, hidden_size], and no length need be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from engine.model.medusa import MedusaLlamaForCausalLM
from engine.training.batch import Batch
from engine.training.mesh import Mesh, peers

Loss = Callable[[int, Tensor], Tensor]
"""Loss of micro-batch i from its normed hidden states; called on the last stage."""
ScheduleName = Literal["gpipe", "1f1b", "interleaved"]


@dataclass(frozen=True)
class Action:
    """What a stage does next: the forward or backward of a micro-batch through one chunk."""

    is_forward: bool
    chunk: int
    index: int


def schedule(
    name: ScheduleName, stage: int, stages: int, count: int, chunks: int = 1
) -> Iterator[Action]:
    """What a stage does with `count` micro-batches, in order.

    - gpipe (Huang et al. 2019): all forwards, then all backwards.
    - 1f1b (Narayanan et al. 2021): at most `stages - stage` micro-batches are held at a time;
      alone, a stage holds one.
    - interleaved (the same): each stage has several chunks of layers, so that less of it waits.
      `count` has to be a multiple of `stages`.
    """
    forwards = list(_order(stages, count, chunks))
    backwards = [(chunks - 1 - chunk, index) for chunk, index in forwards]
    ahead = len(forwards)
    if name == "1f1b":
        ahead = min(ahead, stages - 1 - stage)
    elif name == "interleaved" and stages > 1:
        ahead = min(ahead, 2 * (stages - 1 - stage) + (chunks - 1) * stages)
    elif name == "interleaved":
        ahead = min(ahead, chunks - 1)
    for chunk, index in forwards[:ahead]:
        yield Action(True, chunk, index)
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        yield Action(True, *forward)
        yield Action(False, *backward)
    for chunk, index in backwards[len(forwards) - ahead :]:
        yield Action(False, chunk, index)


def _order(stages: int, count: int, chunks: int) -> Iterator[tuple[int, int]]:
    """(chunk, micro-batch): as many micro-batches as there are stages, chunk by chunk."""
    if chunks == 1:
        yield from ((0, index) for index in range(count))
        return
    for start in range(0, count, stages):
        for chunk in range(chunks):
            yield from ((chunk, index) for index in range(start, min(start + stages, count)))


class Pipeline:
    """One stage of a replica.

    Args:
        chunks: the stage's parts of the model; with more than one, the first chunks of all stages
            come before the second ones.
        dtype: what is computed with.
    """

    def __init__(
        self,
        chunks: Sequence[MedusaLlamaForCausalLM],
        mesh: Mesh,
        device: torch.device,
        dtype: torch.dtype,
        name: ScheduleName = "1f1b",
    ) -> None:
        self.chunks, self.name = list(chunks), name
        self.mesh, self.device, self.dtype = mesh, device, dtype
        self.width = chunks[0].config.hidden_size
        # Not the run's: what learns is float32 whatever is computed in.
        self.model_dtype = next(chunks[0].model.parameters()).dtype
        gloo = mesh.world.size > 1 and dist.get_backend() == "gloo"
        self.wire = torch.device("cpu") if gloo else device
        self._sending: list[tuple[dist.Work, Tensor]] = []

    @property
    def model(self) -> MedusaLlamaForCausalLM:
        """The last chunk, which on the last stage has the norm and all output layers."""
        return self.chunks[-1]

    def autocast(self) -> torch.autocast:
        """Computes in the run's dtype; weights and gradients stay float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def train(self, batches: Sequence[Batch], loss: Loss) -> None:
        """Forward and backward of all micro-batches; gradients add up in the parameters."""
        mesh = self.mesh
        held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for action in schedule(self.name, mesh.stage, mesh.pp, len(batches), len(self.chunks)):
            chunk, index = action.chunk, action.index
            batch = batches[index]
            if action.is_forward:
                x = self._enter(batch, chunk)
                if not self._is_first(chunk):
                    x.requires_grad_(True)
                with self.autocast():
                    out = self.chunks[chunk](x, batch.rows)
                    if self._is_last(chunk):
                        out = loss(index, out)
                if not self._is_last(chunk):
                    self._send(out.detach(), mesh.stage + 1, mesh.forward)
                held[chunk, index] = x, out
            else:
                x, out = held.pop((chunk, index))
                grad = None
                if not self._is_last(chunk):
                    grad = self._receive(batch.hidden_rows, mesh.stage + 1, mesh.backward)
                torch.autograd.backward(out, grad)
                if not self._is_first(chunk):
                    assert x.grad is not None
                    self._send(x.grad, mesh.stage - 1, mesh.backward)
        self._flush()

    def forward(self, batches: Sequence[Batch], finish: Callable[[int, Tensor], None]) -> None:
        """Forward alone, without gradients; `finish` gets the last stage's hidden states."""
        for chunk, index in _order(self.mesh.pp, len(batches), len(self.chunks)):
            with torch.no_grad(), self.autocast():
                out = self.chunks[chunk](self._enter(batches[index], chunk), batches[index].rows)
            if self._is_last(chunk):
                finish(index, out)
            else:
                self._send(out, self.mesh.stage + 1, self.mesh.forward)
        self._flush()

    def _is_first(self, chunk: int) -> bool:
        return self.mesh.first and chunk == 0

    def _is_last(self, chunk: int) -> bool:
        return self.mesh.last and chunk == len(self.chunks) - 1

    def _enter(self, batch: Batch, chunk: int) -> Tensor:
        if self._is_first(chunk):
            return batch.tokens
        return self._receive(batch.hidden_rows, self.mesh.stage - 1, self.mesh.forward)

    def _send(self, tensor: Tensor, stage: int, group: dist.ProcessGroup | None) -> None:
        """Send without waiting: both neighbours may be sending to each other."""
        wire = tensor.to(self.wire, torch.float32).contiguous()
        with peers():
            work = dist.isend(wire, self.mesh.peer(stage % self.mesh.pp), group=group)
        assert work is not None
        self._sending.append((work, wire))

    def _receive(self, rows: int, stage: int, group: dist.ProcessGroup | None) -> Tensor:
        wire = torch.empty(rows, self.width, device=self.wire)
        with peers():
            dist.recv(wire, self.mesh.peer(stage % self.mesh.pp), group=group)
        return wire.to(self.device, self.model_dtype)

    def _flush(self) -> None:
        with peers():
            for work, _ in self._sending:
                work.wait()
        self._sending.clear()
