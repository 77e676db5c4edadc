"""`jupiter bench train`: fine-tuning against a plain transformers loop, in one run.

Same model, rows, batches, AdamW and float32 on both sides, interleaved; each run is a process of
its own, and its first step does not count. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.bench.prompts import OWN
from engine.checkpoint.sources import fetch
from engine.config import load_config
from engine.errors import EngineError

GLOBAL_BATCH = 8
SIDES = {"one": (1, []), "dp2": (2, []), "pp2": (2, ["--pipeline_model_parallel_size", "2"])}
Figures = dict[str, float]


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
    ratio = best["one"]["tokens_per_s"] / best["transformers"]["tokens_per_s"]
    print(json.dumps({"bench": "train", "sides": best, "ratios": {"vs_transformers": ratio}}))
    return 0


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
    return {
        "tokens_per_s": statistics.median(step["tokens_per_s"] for step in steps),
        "memory_bytes": float(steps[-1]["memory_bytes"]),
    }


def _theirs(words: list[str]) -> Figures:
    figures: Figures = json.loads(_run(["engine.bench.train_peer", *words], 1))
    return figures


def _medians(runs: Sequence[Figures]) -> Figures:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _shown(figures: Figures) -> str:
    memory = figures["memory_bytes"] / 2**20
    return f"{figures['tokens_per_s']:.0f} tokens/s, rank 0 holds {memory:.0f} MiB"
