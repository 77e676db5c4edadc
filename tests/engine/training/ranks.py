"""Training runs of several ranks in processes that are started once and used again and again."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.dcp import DcpReader
from engine.checkpoint.mcore import place
from engine.checkpoint.mcore_names import model_tensors, split
from engine.model.config import ModelConfig
from engine.training.args import Command, parse_arguments
from engine.training.checkpoint import find

MOST = 4


def train_here(words: list[str], command: Command = "medusa") -> Path:
    """A run of one rank in this very process."""
    from engine.training.trainer import train

    return train(parse_arguments(words, command))


def _train_as(environment: dict[str, str], words: list[str], command: Command) -> str:
    torch.set_num_threads(1)
    os.environ.update(environment)
    return str(train_here(words, command))


class Ranks:
    """A few waiting processes."""

    def __init__(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._pool = ProcessPoolExecutor(MOST, mp_context=get_context("spawn"))

    def train(self, world: int, words: list[str], command: Command = "medusa") -> Path:
        """Train with `world` ranks; returns the run folder. Raises rank 0's error."""
        if world == 1:
            return train_here(words, command)
        with tempfile.TemporaryDirectory() as folder:
            common = {
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "JUPITER_STORE": f"{folder}/store",
                "GLOO_SOCKET_IFNAME": "lo",
            }
            runs: list[Future[str]] = [
                self._pool.submit(_train_as, {**common, "RANK": str(rank)}, words, command)
                for rank in range(world)
            ]
            for run in runs:
                run.exception(150)
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


def tensors(run: Path, kind: str, model: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """A kind of tensor of a run's latest checkpoint: "" for weights, else states of them.

    Read as `jupiter export` reads them, by Hugging Face's names.
    """
    prefix = f"optimizer.state.{kind}." if kind else ""
    names = list(names)
    heads = [name for name in names if name.startswith("medusa_head.")]
    base = [name for name in names if name not in heads]
    file = DcpReader(find(run))
    found = {name: file.box(prefix + name) for name in heads}
    config = ModelConfig.from_folder(model)
    for tensor in model_tensors(config):
        if not base or set(tensor.parts).isdisjoint(base):
            continue
        joined = torch.empty(tensor.shape, dtype=file.dtype(prefix + tensor.key))
        chunks = place(tensor, joined, config)
        file.read([replace(chunk, key=prefix + chunk.key) for chunk in chunks])
        parts = split(tensor, joined, config.head_dim, config.num_key_value_heads)
        found |= zip(tensor.parts, parts, strict=True)
    return {name: found[name] for name in names}
