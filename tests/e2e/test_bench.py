"""`jupiter bench decode` and `jupiter bench step` on a tiny model, engines and all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from engine.bench.figures import OURS, PLAIN, RATIOS, TWO_STAGES
from engine.checkpoint.heads import write_heads
from tests.tiny import tiny_folder

BENCH = [sys.executable, "-m", "engine.cli.main", "bench"]
PROMPTS = ("tell me a story", "and another one")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A tiny model with two random heads."""
    torch.manual_seed(1)
    tensors = {}
    for head in range(2):
        tensors[f"{head}.0.linear.weight"] = torch.randn(32, 32)
        tensors[f"{head}.0.linear.bias"] = torch.randn(32)
    write_heads(tmp_path / "heads", tensors, layout="v2")
    path = tmp_path / "config.json"
    values = {
        "base_model_name_or_path": str(tiny_folder()),
        "medusa_head_path": str(tmp_path / "heads"),
        "medusa_choices": [[0], [1], [0, 0]],
        "stage_num_hidden_layers_list": [4, 2],
        "device": "cpu",
    }
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return path


def environ(tmp_path: Path) -> dict[str, str]:
    folders = {
        "JUPITER_STATE_DIR": str(tmp_path / "state"),
        "JUPITER_CACHE_DIR": str(tmp_path / "cache"),
    }
    return {**os.environ, **folders}


def bench(tmp_path: Path, *words: str) -> tuple[str, dict[str, Any]]:
    done = subprocess.run(
        [*BENCH, *words], capture_output=True, text=True, timeout=150, env=environ(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_decode_compares_engines_and_ends_with_its_ratios(
    config: Path, prompts: Path, tmp_path: Path
) -> None:
    words = ["--config", str(config), "--file", str(prompts), "--threads", "1"]
    limits = ["--max_new_tokens", "24", "--only", "jupiter", "--only", "transformers"]
    shown, line = bench(tmp_path, "decode", *words, *limits)
    assert line["bench"] == "decode"
    assert list(line["ratios"]) == list(RATIOS)
    without_llamacpp = [ratio for name, ratio in line["ratios"].items() if "llamacpp" not in name]
    assert all(ratio > 0 for ratio in without_llamacpp)
    for name in ("vs_llamacpp_f16", "vs_llamacpp_q4_1"):
        assert line["ratios"][name] is None
        assert "--only" in line["reasons"][name]
    assert line["same_tokens_as_plain"] == {OURS: 2, TWO_STAGES: 2}
    assert line["engines"][PLAIN]["tokens_per_step"] == 1
    assert line["interleaved"] is True
    assert f"| {TWO_STAGES} |" in shown
    assert shown.splitlines()[0] == line["machine"]


def test_batch_writes_the_tokens_of_transformers_padded_batch(config: Path, tmp_path: Path) -> None:
    words = ["--config", str(config), "--prompts", "6", "--longest", "20", "--threads", "1"]
    only = ["--only", "float32", "--only", "transformers", "--set", "num_threads=1"]
    shown, line = bench(tmp_path, "batch", *words, *only)
    assert line["bench"] == "batch"
    assert line["ratios"]["b16_vs_transformers_f32"] > 0
    assert line["ratios"]["b16_vs_b1"] is None
    same = line["same_tokens"]
    assert same["float32 as transformers"] == 6 - len(same["float32, gaps where they part"])
    assert all(gap < 1e-4 for gap in same["float32, gaps where they part"])
    assert "b16_vs_b1: n/a" in shown


def test_prefill_compares_chunks_with_whole_prompts(config: Path, tmp_path: Path) -> None:
    words = ["--config", str(config), "--lengths", "80", "--worlds", "2", "--rounds", "1"]
    shown, line = bench(tmp_path, "prefill", *words, "--threads", "1")
    assert set(line["ratios"]) == {"w2_80", "w2_80_vs_w1"}
    assert all(ratio > 0 for ratio in line["ratios"].values())
    assert line["predicted"]["w2_80"] == pytest.approx(2 * 80 / (80 + 32), abs=0.01)
    assert "| 2 stages, chunks |" in shown


def test_decode_that_is_told_to_end_leaves_no_process(
    config: Path, prompts: Path, tmp_path: Path
) -> None:
    words = ["--config", str(config), "--file", str(prompts), "--max_new_tokens", "100000"]
    with subprocess.Popen(
        [*BENCH, "decode", *words, "--only", "jupiter"],
        stderr=subprocess.PIPE,
        text=True,
        env=environ(tmp_path),
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if TWO_STAGES in line:  # the engine before is up, this one starts
                break
        started = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 128 + signal.SIGTERM
    assert started
    assert psutil.wait_procs(started, timeout=10)[1] == []


def test_step_shows_every_size_beside_the_floor(config: Path, tmp_path: Path) -> None:
    words = ["--config", str(config), "--context", "16", "--rounds", "2", "--threads", "1"]
    shown, line = bench(tmp_path, "step", *words)
    assert line["bench"] == "step"
    assert [step["nodes"] for step in line["steps"]] == [1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(step["step_ms"] > step["floor_bytes_ms"] > 0 for step in line["steps"])
    operations = [step["floor_operations_ms"] for step in line["steps"]]
    assert operations == sorted(operations)
    assert "GB/s" in shown


def test_soak_of_three_stages_leaves_nothing_and_every_answer_is_right(
    config: Path, tmp_path: Path, full: bool
) -> None:
    words = ["--config", str(config), "--requests", "500" if full else "40", "--longest", "24"]
    shown, line = bench(tmp_path, "soak", *words, "--set", "num_threads=1")
    assert line["ok"] is True
    assert line["cancelled"] > 0
    assert line["compared"] > 20
    assert line["differ"] == line["differ_later"] == []
    assert len(line["growth_mb"]) == 3
    assert "over stages 2,2,2" in shown
