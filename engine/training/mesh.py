"""The process grid of a training run, and the groups of ranks that work together in it.

Ranks form a grid [pipeline stage, replica, context part, tensor part]; the last varies fastest, as
in Megatron, so that the ranks with the most to tell each other are neighbours:

    rank = ((stage * dp + replica) * cp + context) * tp + tensor
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import ConfigError, StageLostError
from engine.training.launch import STORE_VARIABLE

TEXT_BYTES = 2048


class Group:
    """Ranks that work together. Alone, nothing is sent.

    Tensors pass through host memory where the backend is gloo.
    """

    def __init__(self, ranks: tuple[int, ...], rank: int, process_group: dist.ProcessGroup | None):
        self.ranks = ranks
        self.size = len(ranks)
        self.index = ranks.index(rank)
        self.process_group = process_group

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up `tensor` over the ranks, in place."""
        if self.size > 1:
            wire = self._wire(tensor)
            with peers():
                dist.all_reduce(wire, group=self.process_group)
            if wire is not tensor:
                tensor.copy_(wire)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest of each element over the ranks, in place."""
        if self.size > 1:
            wire = self._wire(tensor)
            with peers():
                dist.all_reduce(wire, dist.ReduceOp.MAX, group=self.process_group)
            if wire is not tensor:
                tensor.copy_(wire)
        return tensor

    def wait(self) -> None:
        """Until every rank has come here."""
        self.sum_(torch.zeros(1))

    def first_text(self, text: str) -> str:
        """The first text that is not empty, going by rank; "" when all are. For short ones."""
        rows = torch.zeros(self.size, TEXT_BYTES, dtype=torch.uint8)
        data = text.encode()[:TEXT_BYTES]
        rows[self.index, : len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        for row in self.sum_(rows):
            found = bytes(row.tolist()).rstrip(b"\0")
            if found:
                return found.decode("utf-8", "replace")
        return ""

    def reduce_scatter(self, flat: Tensor, shard: Tensor) -> None:
        """Add up `flat` [size * n, ...] over the ranks; `shard` [n, ...] gets this rank's part."""
        self.begin_reduce_scatter(flat, shard)()

    def begin_reduce_scatter(self, flat: Tensor, shard: Tensor) -> Callable[[], None]:
        """As `reduce_scatter`, but only begun; the result ends it."""
        if self.size == 1:
            shard.copy_(flat)
            return _nothing
        wire, part = self._wire(flat), self._wire(shard)
        with peers():
            work = dist.reduce_scatter_single(part, wire, group=self.process_group, async_op=True)
        return self._ending(work, part, shard)

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        """As `sum_`, but only begun; the result ends it."""
        if self.size == 1:
            return _nothing
        wire = self._wire(tensor)
        with peers():
            work = dist.all_reduce(wire, group=self.process_group, async_op=True)
        return self._ending(work, wire, tensor)

    def all_gather_(self, flat: Tensor) -> None:
        """Fill `flat` [size * n] with every rank's part of it; this rank's is there already."""
        self.begin_all_gather(flat)()

    def begin_all_gather(self, flat: Tensor) -> Callable[[], None]:
        """As `all_gather_`, but only begun; the result ends it."""
        if self.size == 1:
            return _nothing
        wire = self._wire(flat)
        part = wire.chunk(self.size)[self.index]
        with peers():
            work = dist.all_gather_single(wire, part, self.process_group, async_op=True)
        return self._ending(work, wire, flat)

    def all_gather(self, part: Tensor) -> Tensor:
        """The parts [n, ...] of all ranks under one another: [size * n, ...]."""
        if self.size == 1:
            return part
        wire = self._wire(part.contiguous())
        whole = wire.new_empty(self.size * len(wire), *wire.shape[1:])
        with peers():
            dist.all_gather_single(whole, wire, self.process_group)
        return whole.to(part.device, part.dtype)

    @staticmethod
    def _ending(work: Any, wire: Tensor, place: Tensor) -> Callable[[], None]:
        def end() -> None:
            with peers():
                work.wait()
            if wire is not place:
                place.copy_(wire)

        return end

    def _wire(self, tensor: Tensor) -> Tensor:
        """The tensor where the backend can send it from, in a type that gloo can add up."""
        if dist.get_backend(self.process_group) != "gloo":
            return tensor.cuda()
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        return tensor.to("cpu", torch.float32 if half else tensor.dtype)


def _nothing() -> None:
    """The end of what needed no message."""


@contextmanager
def peers() -> Iterator[None]:
    """Tell what is the loss of another rank from errors of this one."""
    try:
        yield
    except RuntimeError as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StageLostError(f"another rank is gone: {line}") from None


@dataclass(frozen=True)
class Mesh:
    """Where this rank is in the grid, and whom it works with."""

    rank: int
    pp: int
    """Pipeline stages."""
    dp: int
    """Replicas of the model."""
    world: Group
    tensor: Group
    """The ranks that share each layer."""
    context: Group
    """The ranks that share each sequence."""
    replicas: Group
    """The ranks with the same weights: other replicas, and other parts of the sequences."""
    same_stage: Group
    """The ranks with the same layers: `replicas` and the other parts of the layers."""
    ends: Group | None
    """The ranks with this rank's part of tied embeddings, which both ends of the pipeline hold;
    None on the stages between."""
    forward: dist.ProcessGroup | None
    """Carries hidden states along this replica's stages."""
    backward: dist.ProcessGroup | None
    """Carries gradients back; apart, so that the two directions never wait for each other."""
    saving: dist.ProcessGroup | None
    """All ranks again, for checkpoints that are written while the run goes on."""

    @property
    def stage(self) -> int:
        return self.rank // (self.dp * self.cp * self.tp)

    @property
    def replica(self) -> int:
        return self.rank // (self.cp * self.tp) % self.dp

    @property
    def cp(self) -> int:
        return self.context.size

    @property
    def tp(self) -> int:
        return self.tensor.size

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.pp - 1

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for those that share its replica and stage."""
        return self.context.index == 0 and self.tensor.index == 0

    def peer(self, stage: int) -> int:
        """The rank of another stage that holds the same part of it."""
        return self.rank + (stage - self.stage) * self.dp * self.cp * self.tp


def world_size() -> int:
    """Ranks that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_mesh(pp: int = 1, tp: int = 1, cp: int = 1, *, saving: bool = False) -> Mesh:
    """The grid over all ranks; every rank must call this, after `join`.

    saving: whether checkpoints are written while the run goes on.

    Raises:
        ConfigError: the number of ranks is no multiple of `pp` × `tp` × `cp`.
    """
    rank, world = int(os.environ.get("RANK", "0")), world_size()
    if world % (pp * tp * cp):
        raise ConfigError(
            f"pipeline_model_parallel_size {pp} × tensor_model_parallel_size {tp} × "
            f"context_parallel_size {cp} does not divide the {world} processes (NPROC_PER_NODE)"
        )
    grid = torch.arange(world).view(pp, -1, cp, tp)
    # Every rank has to make every group, in the same order.
    groups = {
        name: _own_group(grid, along, rank)
        for name, along in {
            "tensor": (3,),
            "context": (2,),
            "replicas": (1, 2),
            "same_stage": (1, 2, 3),
        }.items()
    }
    ends = _group_among(grid[[0, -1]], (0, 1, 2), rank) if pp > 1 else None
    columns = [_process_group(ranks) for _ in range(2) for ranks in _lines(grid, (0,))]
    own = next(at for at, ranks in enumerate(_lines(grid, (0,))) if rank in ranks)
    whole = Group(tuple(range(world)), rank, dist.group.WORLD if world > 1 else None)
    return Mesh(
        rank=rank,
        pp=pp,
        dp=grid.shape[1],
        world=whole,
        **groups,
        ends=ends,
        forward=columns[own],
        backward=columns[own + len(columns) // 2],
        saving=dist.new_group(backend="gloo") if saving and world > 1 else None,
    )


def _own_group(grid: Tensor, along: tuple[int, ...], rank: int) -> Group:
    found = _group_among(grid, along, rank)
    assert found is not None
    return found


def _group_among(grid: Tensor, along: tuple[int, ...], rank: int) -> Group | None:
    """Make the groups of ranks that differ in the dimensions `along` only; returns this rank's."""
    found = None
    for ranks in _lines(grid, along):
        process_group = _process_group(ranks)
        if rank in ranks:
            found = Group(tuple(ranks), rank, process_group)
    return found


def _lines(grid: Tensor, along: tuple[int, ...]) -> list[list[int]]:
    """The ranks of each slice of the grid along some dimensions."""
    others = [dim for dim in range(grid.dim()) if dim not in along]
    size = math.prod(grid.shape[dim] for dim in along)
    return grid.permute(*others, *along).reshape(-1, size).tolist()


def _process_group(ranks: list[int]) -> dist.ProcessGroup | None:
    return dist.new_group(ranks) if len(ranks) > 1 else None


def choose_device() -> torch.device:
    """The GPU of this rank: its local rank modulo their count; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device(
        "cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    )
    torch.cuda.set_device(device)
    return device


def join(backend: str, timeout_minutes: float) -> None:
    """Join the other ranks; nothing to do for one alone.

    NCCL is used only where every rank has a GPU of its own, else gloo.
    """
    if world_size() == 1:
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if backend == "nccl" and (not torch.cuda.is_available() or torch.cuda.device_count() < local):
        backend = "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    path, rank, world = os.environ.get(STORE_VARIABLE), int(os.environ["RANK"]), world_size()
    with peers():
        if path is None:
            dist.init_process_group(backend, timeout=timeout)
            return
        store = dist.FileStore(path, world)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def leave() -> None:
    """Close the connections to the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
