"""float16 with loss scaling, and models that begin with new weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.checkpoint.mcore import McoreReader
from engine.cli.main import main
from engine.model.config import ModelConfig
from engine.training import loss_scale
from tests.engine.training.ranks import Ranks, steps, train_here, without
from tests.tiny import tiny_folder


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    rows = [{"query": "ask", "response": "abcdefgh"[: 3 + n % 5]} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # fmt: off
    return [
        "--model", str(tiny_folder("llama", 4)), "--dataset", str(tmp_path / "rows.jsonl"),
        "--save", str(tmp_path / "runs"), "--split_dataset_ratio", "0", "--global_batch_size", "4",
        "--log_interval", "1", "--lr", "1e-3", "--logging_level", "warning",
    ]
    # fmt: on


def norm(run: Path) -> torch.Tensor:
    return McoreReader(run).tensor("model.norm.weight")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_learns_as_float32_does(dtype: str, words: list[str]) -> None:
    words = [*words, "--train_iters", "4"]
    whole, half = train_here(words, "sft"), train_here([*words, f"--{dtype}", "true"], "sft")
    expected = [step["loss"] for step in steps(whole)]
    assert [step["loss"] for step in steps(half)] == pytest.approx(expected, rel=0.02)
    assert expected[-1] < expected[0]
    assert norm(half).dtype == torch.float32  # the masters are what is saved
    scales = [step.get("loss_scale") for step in steps(half)]
    assert scales == ([2.0**16] * 4 if dtype == "fp16" else [None] * 4)


def test_an_overflow_skips_the_update_and_lowers_the_scale_for_good(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**40)
    words = [*words, "--fp16", "true"]
    first = train_here([*words, "--train_iters", "1"], "sft")
    (step,) = steps(first)
    assert step["grad_norm"] is None and math.isfinite(step["loss"])
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama", 4))
    assert torch.equal(norm(first), model.model.norm.weight)
    rest = train_here([*words, "--train_iters", "4", "--load", str(first)], "sft")
    scales = [step["loss_scale"] for step in steps(rest)]
    assert scales == [2.0**39, 2.0**38, 2.0**37]  # the second overflow, and each one after it
    assert torch.equal(norm(rest), norm(first))


def test_float16_is_the_same_over_ranks(words: list[str], ranks: Ranks) -> None:
    words = [*words, "--fp16", "true", "--train_iters", "2"]
    shares = ["--tensor_model_parallel_size", "2"]
    alone, shared = train_here(words, "sft"), ranks.train(2, [*words, *shares], "sft")
    expected = [step["loss"] for step in steps(alone)]
    assert [step["loss"] for step in steps(shared)] == pytest.approx(expected, rel=0.01)


def test_a_model_of_another_shape_begins_anew(words: list[str], tmp_path: Path) -> None:
    # fmt: off
    shape = [
        "--no_initialization", "false", "--num_layers", "3", "--hidden_size", "48",
        "--ffn_hidden_size", "64", "--num_attention_heads", "6", "--num_query_groups", "2",
        "--untie_embeddings_and_output_weights", "true", "--rotary_base", "5000",
        "--norm_epsilon", "1e-6", "--add_qkv_bias", "true", "--disable_bias_linear", "false",
        "--max_position_embeddings", "256",
    ]
    # fmt: on
    run = train_here([*words, *shape, "--train_iters", "12"], "sft")
    losses = [step["loss"] for step in steps(run)]
    assert losses[0] == pytest.approx(math.log(260), rel=0.05) and losses[-1] < losses[0] - 0.1
    made = ModelConfig.from_folder(run)
    assert (made.num_hidden_layers, made.hidden_size, made.head_dim) == (3, 48, 8)
    output = tmp_path / "hf"
    given = ["--mcore_model", str(run), "--to_hf", "true", "--output_dir", str(output)]
    assert main(["export", *given, "--test_convert_precision", "true"]) == 0
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.num_key_value_heads == 2 and not model.config.tie_word_embeddings
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    words = without(words, "--model")
    on = train_here([*words, "--load", str(run), "--train_iters", "13"], "sft")
    assert [step["iteration"] for step in steps(on)] == [13]
