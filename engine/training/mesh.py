"""The process grid of a training run, and the groups of ranks that work together in it.

Ranks form a grid [pipeline stage, replica]; replicas vary fastest, as in Megatron, so that the
ranks that exchange gradients are neighbours:

    rank = stage * dp + replica
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

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
        """Add up `flat` [size * n] over the ranks; `shard` [n] gets this rank's part."""
        wire, part = self._wire(flat), self._wire(shard)
        with peers():
            dist.reduce_scatter_single(part, wire, group=self.process_group)
        if part is not shard:
            shard.copy_(part)

    def all_gather_(self, flat: Tensor) -> None:
        """Fill `flat` [size * n] with every rank's part of it; this rank's is there already."""
        if self.size == 1:
            return
        wire = self._wire(flat)
        with peers():
            dist.all_gather_single(wire, wire.chunk(self.size)[self.index], self.process_group)
        if wire is not flat:
            flat.copy_(wire)

    def _wire(self, tensor: Tensor) -> Tensor:
        """The tensor where the backend can send it from."""
        return tensor.cpu() if dist.get_backend(self.process_group) == "gloo" else tensor.cuda()


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
    dp: int
    """Replicas of each stage."""
    pp: int
    """Pipeline stages."""
    world: Group
    replicas: Group
    """The ranks with the same stage."""
    ends: Group | None
    """First and last stage of all replicas, which both hold tied embeddings; None on others."""
    forward: dist.ProcessGroup | None
    """Carries hidden states along this replica's stages."""
    backward: dist.ProcessGroup | None
    """Carries gradients back; apart, so that the two directions never wait for each other."""

    @property
    def stage(self) -> int:
        return self.rank // self.dp

    @property
    def replica(self) -> int:
        return self.rank % self.dp

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.pp - 1

    def peer(self, stage: int) -> int:
        """The rank of another stage of the same replica."""
        return stage * self.dp + self.replica


def world_size() -> int:
    """Ranks that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_mesh(pp: int) -> Mesh:
    """The grid over all ranks; every rank must call this, after `join`.

    Raises:
        ConfigError: the number of ranks is no multiple of `pp`.
    """
    rank, world = int(os.environ.get("RANK", "0")), world_size()
    if world % pp:
        raise ConfigError(
            f"--pipeline_model_parallel_size {pp} does not divide the {world} processes; "
            f"start a multiple of {pp} (NPROC_PER_NODE)"
        )
    dp = world // pp
    grid = torch.arange(world).view(pp, dp)
    # Every rank has to make every group, in the same order.
    replicas = [_group(tuple(row.tolist()), rank) for row in grid]
    columns = [(_process_group(ranks), _process_group(ranks)) for ranks in grid.T.tolist()]
    ends = _group(tuple(grid[[0, -1]].flatten().tolist()), rank) if pp > 1 else None
    forward, backward = columns[rank % dp]
    own = replicas[rank // dp]
    assert own is not None
    whole = Group(tuple(range(world)), rank, dist.group.WORLD if world > 1 else None)
    return Mesh(rank, dp, pp, whole, own, ends, forward, backward)


def _group(ranks: tuple[int, ...], rank: int) -> Group | None:
    process_group = _process_group(list(ranks))
    return Group(ranks, rank, process_group) if rank in ranks else None


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
