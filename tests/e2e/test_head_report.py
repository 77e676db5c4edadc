"""`jupiter medusa eval` on live stages: what it predicts of a tree is what the engine then does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.heads import write_heads
from tests.tiny import tiny_folder


@pytest.fixture
def setting(tmp_path: Path) -> Path:
    """A config of two stages with heads that echo the next token's guesses, and a prompt file."""
    tensors = {}
    for head in range(3):
        tensors[f"medusa_head.{head}.0.linear.weight"] = torch.zeros(32, 32)
        tensors[f"medusa_head.{head}.0.linear.bias"] = torch.zeros(32)
    write_heads(tmp_path / "heads", tensors, layout="v2")
    config = {
        "base_model_name_or_path": str(tiny_folder()),
        "medusa_head_path": str(tmp_path / "heads"),
        "stage_num_hidden_layers_list": [2, 4],
        "device": "cpu",
        "num_threads": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = [{"id": str(n), "messages": [{"role": "user", "content": f"{n} " * n}]} for n in (3, 9)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def report(folder: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "engine.cli.main", "medusa", "eval"),
            *("--config", str(folder / "config.json")),
            *("--dataset", str(folder / "prompts.jsonl"), "--max_new_tokens", "40"),
            *words,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JUPITER_STATE_DIR": str(folder / "state"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    table, last = done.stdout.rsplit("\n", 2)[:2]
    assert "published top-1" in table
    figures = json.loads(last)
    assert isinstance(figures, dict)
    return figures


def test_a_calibrated_tree_accepts_what_the_report_predicted(setting: Path) -> None:
    before = report(setting, "--medusa_choices", "mc_63", "--calibrate", "true")
    assert before["tree_size"] > 17
    assert [len(row) for row in before["top_k_accuracy"]] == [10, 10, 10]
    for row in before["top_k_accuracy"]:
        assert row == sorted(row)
        assert 0 <= row[-1] <= 1
    predicted = before["best_choices_tokens_per_step"]["mc_16"]
    after = report(setting, "--medusa_choices", "mc_16")
    assert after["tokens_per_step"]["greedy"] == pytest.approx(predicted)
    assert predicted > 1.05  # echoing heads are right where an answer repeats itself
