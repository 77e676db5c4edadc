"""Training runs of several ranks in processes that are started once and used again and again."""

from __future__ import annotations

import json
import os
import tempfile
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.safetensors_file import read_index
from engine.training.args import parse_arguments
from engine.training.checkpoint import find

MOST = 4


def train_here(words: list[str]) -> Path:
    """A run of one rank in this very process."""
    from engine.training.trainer import train

    return train(parse_arguments(words))


def _train_as(environment: dict[str, str], words: list[str]) -> str:
    torch.set_num_threads(1)
    os.environ.update(environment)
    return str(train_here(words))


class Ranks:
    """A few waiting processes."""

    def __init__(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._pool = ProcessPoolExecutor(MOST, mp_context=get_context("spawn"))

    def train(self, world: int, words: list[str]) -> Path:
        """Train with `world` ranks; returns the run folder. Raises rank 0's error."""
        if world == 1:
            return train_here(words)
        with tempfile.TemporaryDirectory() as folder:
            common = {
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "JUPITER_STORE": f"{folder}/store",
                "GLOO_SOCKET_IFNAME": "lo",
            }
            runs: list[Future[str]] = [
                self._pool.submit(_train_as, {**common, "RANK": str(rank)}, words)
                for rank in range(world)
            ]
            for run in runs:
                run.exception(60)
            return Path(runs[0].result())

    def close(self) -> None:
        self._pool.shutdown()


def without(words: list[str], name: str) -> list[str]:
    """The words of a command line but for one argument and its value."""
    at = words.index(name)
    return words[:at] + words[at + 2 :]


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's logging.jsonl."""
    text = (run / "logging.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def steps(run: Path) -> list[dict[str, Any]]:
    """Those of them that are about training steps."""
    return [record for record in records(run) if "loss" in record]


def tensors(run: Path, kind: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A kind of tensor of a run's latest checkpoint, put together from all ranks' files."""
    found = {name: np.full(torch.Size(shape).numel(), np.nan) for name, shape in shapes.items()}
    for path in find(run).glob("*.safetensors"):
        for entry, stored in read_index(path).items():
            if not entry.startswith(f"{kind}/"):
                continue
            name, _, start = entry.removeprefix(f"{kind}/").rpartition("@")
            if name not in shapes:
                continue
            values = np.fromfile(path, "<f4", count=stored.shape[0], offset=stored.start)
            span = slice(int(start), int(start) + len(values))
            assert np.isnan(found[name][span]).all(), "stored twice"
            found[name][span] = values
    whole = {name: torch.from_numpy(values).float() for name, values in found.items()}
    return {name: values.view(shapes[name]) for name, values in whole.items()}
