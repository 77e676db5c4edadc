"""`jupiter bench train`: fine-tuning against a plain transformers loop, in one run.

Same model, rows, batches, AdamW and float32 on both sides, interleaved; each run is a process of
its own, and its first step does not count. Memory is what each rank holds after its last step. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bench.prompts import OWN
from engine.checkpoint.sources import fetch
from engine.config import load_config
from engine.errors import EngineError

GLOBAL_BATCH = 8
# Ranks, and what they are told.
SIDES: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "dp2": (2, []),
    "dp2 whole optimizer": (2, ["--use_distributed_optimizer", "false"]),
    "pp2": (2, ["--pipeline_model_parallel_size", "2"]),
}


@dataclass(frozen=True)
class Figures:
    """What a run came to."""

    tokens_per_s: float
    memory_bytes: list[int]
    """Of each rank."""


def main(words: Sequence[str]) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(prog="jupiter bench train", description=__doc__)
    parser.add_argument("--model", help="folder or source; by default the config's")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--micro_batch_size", type=int, default=2)
    args = parser.parse_args(words)
    source = args.model or load_config(None).base_model_name_or_path
    model = fetch(source, lambda line: print(line, file=sys.stderr))
    found: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory(prefix="jupiter-bench-") as folder:
        dataset = _write_rows(Path(folder) / "rows.jsonl")
        common = _arguments(args, model, dataset)
        for _ in range(args.rounds):
            for name, (ranks, more) in SIDES.items():
                figures = _ours([*common, "--save", f"{folder}/runs", *more], ranks)
                found.setdefault(name, []).append(figures)
                print(f"jupiter {name}: {_shown(figures)}", flush=True)
            figures = _theirs(common)
            found.setdefault("transformers", []).append(figures)
            print(f"transformers: {_shown(figures)}", flush=True)
    best = {name: _medians(runs) for name, runs in found.items()}
    _print_table(best)
    ratio = best["one"].tokens_per_s / best["transformers"].tokens_per_s
    sides = {name: dataclasses.asdict(figures) for name, figures in best.items()}
    print(json.dumps({"bench": "train", "sides": sides, "ratios": {"vs_transformers": ratio}}))
    return 0


def _print_table(best: Mapping[str, Figures]) -> None:
    theirs = best["transformers"].tokens_per_s
    print(f"\n{'':20} {'tokens/s':>9} {'ratio':>6}  MiB of each rank")
    for name, figures in best.items():
        rate = figures.tokens_per_s
        print(f"{name:20} {rate:9.0f} {rate / theirs:6.2f}  {_memory(figures)}")


def _arguments(args: argparse.Namespace, model: Path, dataset: Path) -> list[str]:
    # fmt: off
    return [
        "--model", str(model), "--dataset", str(dataset), "--split_dataset_ratio", "0",
        "--eval_iters", "0", "--global_batch_size", str(GLOBAL_BATCH),
        "--micro_batch_size", str(args.micro_batch_size), "--train_iters", str(args.steps + 1),
        "--bf16", "false", "--log_interval", "1", "--logging_level", "warning",
        "--no_save_optim", "true", "--max_length", "256",
    ]
    # fmt: on


def _write_rows(path: Path) -> Path:
    """Questions with answers of very different lengths."""
    rows = [
        {"query": prompt, "response": (prompt + " ") * (1 + number % 6)}
        for number, prompt in enumerate(list(OWN) * 4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _run(command: list[str], ranks: int) -> str:
    environment = {**os.environ, "NPROC_PER_NODE": str(ranks)}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise EngineError(f"{command[0]}: {(done.stderr.splitlines() or ['failed'])[-1]}")
    return done.stdout.splitlines()[-1]


def _ours(words: list[str], ranks: int) -> Figures:
    run = Path(_run(["engine.cli.main", "sft", *words], ranks))
    lines = (run / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    steps: list[dict[str, Any]] = [json.loads(line) for line in lines][1:]
    rate = statistics.median(step["tokens_per_s"] for step in steps)
    return Figures(rate, steps[-1]["memory_bytes_per_rank"])


def _theirs(words: list[str]) -> Figures:
    return Figures(**json.loads(_run(["engine.bench.train_peer", *words], 1)))


def _medians(runs: Sequence[Figures]) -> Figures:
    return Figures(
        statistics.median(run.tokens_per_s for run in runs),
        [
            round(statistics.median(rank))
            for rank in zip(*(r.memory_bytes for r in runs), strict=True)
        ],
    )


def _shown(figures: Figures) -> str:
    return f"{figures.tokens_per_s:.0f} tokens/s, MiB of each rank: {_memory(figures)}"


def _memory(figures: Figures) -> str:
    return " ".join(f"{size / 2**20:.0f}" for size in figures.memory_bytes)
