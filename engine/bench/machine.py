"""The machine that a figure was measured on, for people."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version


def machine(threads: int, packages: Sequence[str]) -> str:
    """One line such as "AMD EPYC, 2 cores (2 threads used), 24 GB, Linux x86_64; torch 2.13.0"."""
    import torch

    from engine.pipeline.memory import device_name, memory_total_bytes

    cpu = torch.device("cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [
        device_name(cpu),
        f"{cores} cores ({threads} threads used)",
        f"{memory_total_bytes(cpu) / 2**30:.0f} GB",
        f"{platform.system()} {platform.machine()}",
    ]
    if torch.cuda.is_available():
        parts.insert(0, device_name(torch.device("cuda", 0)))
    return f"{', '.join(parts)}; {', '.join(filter(None, map(_version, packages)))}"


def _version(package: str) -> str:
    try:
        return f"{package} {version(package).split('+')[0]}"
    except PackageNotFoundError:
        return ""
