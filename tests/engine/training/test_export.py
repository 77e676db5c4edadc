"""What a run leaves is what the engine and transformers load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.heads import inspect_heads, read_heads
from engine.config import parse_config
from engine.pipeline.build import build_stage, make_plan
from tests.engine.training.ranks import Ranks, tensors, train_here
from tests.tiny import tiny_folder


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    path = tmp_path / "rows.jsonl"
    rows = [{"query": "ask", "response": "abcdefgh"[: 3 + n % 5]} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # fmt: off
    return [
        "--dataset", str(path), "--save", str(tmp_path / "runs"), "--split_dataset_ratio", "0",
        "--global_batch_size", "4", "--medusa_num_heads", "2", "--train_iters", "2",
        "--logging_level", "warning",
    ]
    # fmt: on


def engine_heads(folder: Path, heads: Path) -> Any:
    """The heads as the engine's own stage loads them."""
    values = {
        "base_model_name_or_path": str(folder),
        "medusa_head_path": str(heads),
        "stage_num_hidden_layers_list": [3],
        "torch_dtype": "float32",
        "max_kv_cache_length": 64,
    }
    plan = make_plan(parse_config(values, "a test"), folder)
    return build_stage(plan, 0, torch.device("cpu"), lambda done, total: None).model


SHARED, OWN = ["--original_lm_head", "true"], ["--original_lm_head", "false"]
LAYOUTS = {
    "v2": SHARED,
    "vllm": SHARED,
    "fasterdecoding": OWN,
    "vllm with outputs": OWN,
    "vllm with a part of the vocabulary": [*OWN, "--truncated_vocab_size", "20"],
    "two ResBlocks": [*SHARED, "--medusa_num_layers", "2"],
    "hydra": [*SHARED, "--medusa_head_kind", "hydra", "--medusa_soft_targets", "0.5"],
    "root": [*SHARED, "--medusa_head_kind", "root", "--medusa_num_layers", "2"],
    "root with a part of the vocabulary": [
        *OWN,
        "--medusa_head_kind",
        "root",
        "--medusa_inner_size",
        "24",
        "--truncated_vocab_size",
        "20",
    ],
}


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_engine_loads_the_heads_that_were_trained(
    case: str, kind: str, words: list[str]
) -> None:
    layout = ["--heads_layout", "vllm"] if case.startswith("vllm") else []
    folder = tiny_folder(kind, 3)
    run = train_here([*words, "--model", str(folder), *LAYOUTS[case], *layout])
    loaded = {
        name: tensor
        for name, tensor in engine_heads(folder, run / "heads").state_dict().items()
        if name.startswith("medusa_head")
    }
    trained = tensors(run, "", folder, loaded)
    assert len(loaded) >= 4
    for name, tensor in loaded.items():
        torch.testing.assert_close(trained[name], tensor)
        assert tensor.any()
    config = json.loads((run / "heads" / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)


def test_heads_on_a_part_of_the_vocabulary_say_which(words: list[str]) -> None:
    more = ["--truncated_vocab_size", "20", "--heads_layout", "vllm", *OWN]
    run = train_here([*words, "--model", str(tiny_folder("llama", 3)), *more])
    spec = inspect_heads(run / "heads")
    assert spec.vocab_size == 20
    assert spec.token_map is not None
    # The answers are made of a to g and the end of turn: 65 to 71 in this tokenizer, and 259.
    assert set(range(65, 72)) | {259} <= set(spec.token_map)


def test_heads_that_share_lm_head_draft_from_the_tokens_they_were_held_to(words: list[str]) -> None:
    folder = tiny_folder("llama", 3)
    more = ["--truncated_vocab_size", "20", "--medusa_head_kind", "root"]
    run = train_here([*words, "--model", str(folder), *SHARED, *more])
    spec = inspect_heads(run / "heads")
    assert spec.vocab_size is None
    assert spec.token_map is not None
    model = engine_heads(folder, run / "heads")
    drafted = model.draft(torch.randn(9, model.config.hidden_size), torch.arange(9), 20)
    assert {int(token) for token in drafted.flatten()} == set(spec.token_map)


@pytest.mark.parametrize(("world", "stages"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_medusa_2_leaves_a_base_that_transformers_loads(
    world: int, stages: int, kind: str, ranks: Ranks, words: list[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_folder(kind, 3)
    # fmt: off
    run = ranks.train(world, [
        *words, "--model", str(folder), "--medusa_objective", "medusa2", "--lr", "1e-3",
        "--pipeline_model_parallel_size", str(stages),
    ])
    # fmt: on
    base = AutoModelForCausalLM.from_pretrained(run / "model")
    parameters = dict(base.named_parameters())
    trained = tensors(run, "", folder, parameters)
    for name, parameter in parameters.items():
        torch.testing.assert_close(trained[name], parameter.detach())
    before = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert not any(parameter.equal(before[name]) for name, parameter in parameters.items())
    assert AutoTokenizer.from_pretrained(run / "model").encode("ab")
    engine_heads(run / "model", run / "heads")


def test_heads_are_stored_in_the_models_own_dtype(words: list[str], tmp_path: Path) -> None:
    from tests.tiny import reference, save

    folder = save(reference("llama", layers=2).to(torch.bfloat16), tmp_path / "half")
    run = train_here([*words, "--model", str(folder)])
    heads = read_heads(run / "heads")
    assert {tensor.dtype for tensor in heads.values()} == {torch.bfloat16}
    assert heads["medusa_head.1.0.linear.weight"].any()


def test_bfloat16_computes_close_to_float32(words: list[str]) -> None:
    from tests.engine.training.ranks import steps

    # fmt: off
    common = [
        *words, "--model", str(tiny_folder("llama", 3)), "--log_interval", "1",
        "--medusa_objective", "medusa2", "--medusa_warmup_iters", "1",
    ]
    # fmt: on
    plain, half = train_here(common), train_here([*common, "--bf16", "true"])
    losses = [[step["loss"] for step in steps(run)] for run in (plain, half)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
    frozen = [*words, "--model", str(tiny_folder("llama", 3)), "--log_interval", "1"]
    losses = [
        [step["loss"] for step in steps(train_here([*frozen, *more]))]
        for more in ([], ["--bf16", "true"])
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
