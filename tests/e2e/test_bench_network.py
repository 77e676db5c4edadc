"""`jupiter bench network` in real namespaces, on a tiny model that can be cut into three."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from engine.bench.network.rig import missing
from tests.tiny import save

JUPITER = [sys.executable, "-m", "engine.cli.main"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Three KV heads, so that tensor parallelism has a part for each rank."""
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=259,
        tie_word_embeddings=False,
    )
    folder = save(transformers.LlamaForCausalLM(shape).eval(), tmp_path / "model")
    path = tmp_path / "config.json"
    values = {"base_model_name_or_path": str(folder), "stage_num_hidden_layers_list": [4]}
    path.write_text(json.dumps(values))
    return path


def bench(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*JUPITER, "bench", "network", "--config", str(config), *words],
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_all_three_answer_the_same_over_shaped_and_slow_links(config: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    few = ["--prompts", "1", "--words", "5", "--max_new_tokens", "6"]
    done = bench(config, *few, "--mbit", "1", "--latency_ms", "5", "--rounded", "auto")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| 1 of 1 |") >= 3  # greedy, so the same tokens
    # A row is on its way for longer than this model's three small stages compute it.
    assert "| jupiter, auto links (int8) |" in done.stdout
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["bench"] == "network"
    assert set(told["ratios"]) == {"vs_lockstep_1mbit_5ms", "vs_tensor_parallel_1mbit_5ms"}
    assert all(ratio > 0 for ratio in told["ratios"].values())
    # Two sums in each of four layers for each of six tokens, none sooner than a message comes.
    (seconds,) = told["seconds"]["1mbit_5ms"]["tensor"]
    assert seconds > 2 * 4 * 6 * 0.005


def test_a_model_that_cannot_be_cut_is_one_line(config: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    model = json.loads(config.read_text())["base_model_name_or_path"]
    file = Path(model) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_key_value_heads": 2}))
    done = bench(config)
    assert done.returncode == 2
    assert "2 KV heads cannot be cut into 3" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
