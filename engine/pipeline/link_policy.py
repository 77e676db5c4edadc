"""What `link_dtype: "auto"` comes to: hidden states are rounded where links hold stages up."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from engine.config import JupiterConfig
from engine.pipeline.group import stages_here
from engine.pipeline.stage import Stage
from engine.pipeline.wire import LinkDtype, Wire
from engine.planning.profiler import run_s

SHARE = 0.25
"""Of the time that a stage computes a chunk: so long at most it should be on its way."""
KINDS: tuple[LinkDtype, ...] = ("exact", "bfloat16", "int8")
BIG_BYTES = 1 << 18
ROUNDS = 3


def promises_exact(config: JupiterConfig) -> bool:
    """Whether answers are greedy unless a request says otherwise: these have to stay what they are.

    A request's own `temperature: 0` does not make it so: who writes "auto" lets links decide.
    """
    return config.sampling == "greedy" or config.temperature == 0.0


def choose(row_bytes: dict[LinkDtype, int], rows: int, chunk_s: float, mbit: float) -> LinkDtype:
    """The most exact form in which a chunk is no longer on its way than SHARE of its computing.

    row_bytes: of a row in each form; rows: of a chunk; chunk_s: what a stage computes on it;
    mbit: million bits per second of the slowest link.
    """
    for kind in KINDS:
        if 8 * rows * row_bytes[kind] / (mbit * 1e6) <= SHARE * chunk_s:
            return kind
    return KINDS[-1]


def agreed_link_dtype(config: JupiterConfig, stage: Stage, rank: int) -> LinkDtype:
    """The config's form, or for "auto" the one that all ranks come to; all have to ask together.

    Measured over the group's own connections. On one machine nothing is gained by rounding, and
    links between GPUs are no slow ones: "exact" there, and where answers are promised exact.
    """
    if config.link_dtype != "auto":
        return config.link_dtype
    here = stages_here(config) >= config.world_size
    if promises_exact(config) or here or dist.get_backend() == "nccl":
        return "exact"
    rows = min(config.max_sub_sequence_len, stage.store.capacity)
    run_s(stage, rows, 0)
    measured = torch.tensor(
        [run_s(stage, rows, 0), _slowest_mbit(rank, config.world_size)], dtype=torch.float64
    )
    dist.all_reduce(measured, dist.ReduceOp.MIN)
    chunk_s, mbit = measured.tolist()
    width = stage.model.config.hidden_size
    sizes = {kind: Wire(kind, width, stage.dtype).row_bytes for kind in KINDS}
    return choose(sizes, rows, chunk_s, mbit)


def _slowest_mbit(rank: int, world: int) -> float:
    """Of the link behind this stage, one after the other; infinite where it tells nothing."""
    big, small = torch.zeros(BIG_BYTES, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    mbit = float("inf")
    for hop in range(world - 1):
        if rank == hop:
            big_s = min(_answered_s(big, hop + 1, small) for _ in range(ROUNDS))
            small_s = min(_answered_s(small, hop + 1, small) for _ in range(ROUNDS))
            if big_s > small_s:
                mbit = 8 * BIG_BYTES / (big_s - small_s) / 1e6
        elif rank == hop + 1:
            for message in (big, small):
                for _ in range(ROUNDS):
                    dist.recv(message, hop)
                    dist.send(small, hop)
    return mbit


def _answered_s(message: torch.Tensor, to: int, answer: torch.Tensor) -> float:
    began = time.perf_counter()
    dist.send(message, to)
    dist.recv(answer, to)
    return time.perf_counter() - began
