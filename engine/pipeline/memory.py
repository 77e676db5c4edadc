"""What memory a stage holds, and what there is where it runs."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from engine.pipeline.stage import Stage

CGROUPS = Path("/sys/fs/cgroup")
KV_SHARE = 0.8
"""Of the memory that is free when all weights are loaded, what keys and values may have."""


def memory_bytes(device: torch.device) -> int:
    """Memory allocated on a CUDA device by this process; elsewhere the process's resident memory.

    Several stages on one GPU are several processes: each counts its own.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def memory_total_bytes(device: torch.device) -> int:
    """Memory of the CUDA device, or else what this process may have of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([psutil.virtual_memory().total, *cgroup_limits(CGROUPS)])


def memory_free_bytes(device: torch.device) -> int:
    """Memory that is free on the CUDA device, or else that this process may still have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = cgroup_limits(CGROUPS)
    left = [limit - psutil.Process().memory_info().rss for limit in limits]
    return max(0, min([psutil.virtual_memory().available, *left]))


def kv_rows(stage: Stage, stages_here: int) -> int:
    """KV rows, of all sequences together, that a stage's free memory has room for.

    `stages_here`: of this machine, or of the GPU; they share what is free.
    """
    free = KV_SHARE * memory_free_bytes(stage.device) / stages_here
    return max(1, int(free / stage.store.row_bytes))


def weights_bytes(stage: Stage) -> int:
    """Bytes of a stage's parameters, buffers and packed weights; shared memory counts once."""
    tensors = [*stage.model.parameters(), *stage.model.buffers()]
    storages = [tensor.untyped_storage() for tensor in tensors]
    kept = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    return kept + stage.forward.packed_bytes


@cache
def device_name(device: torch.device) -> str:
    """The device's name for people, such as "NVIDIA RTX A6000" or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), "") or platform.processor() or platform.machine()


def cgroup_limits(root: Path, membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Memory limits, in bytes, of this process's control group and those around it.

    Both versions of the kernel's interface; no limit (or no Linux) gives none.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (root / "memory", "limit_in_bytes") if controllers else (root, "max")
        folder = base / group.lstrip("/")
        folders = [folder, *folder.parents]
        files += [f / f"memory.{name}" for f in folders[: folders.index(base) + 1]]
    return [limit for file in files if (limit := _limit(file)) is not None]


def _limit(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() else None  # "max" is none
