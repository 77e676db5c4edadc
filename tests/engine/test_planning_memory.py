"""What a split is said to need is what its stages then hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from engine.checkpoint.heads import write_heads
from engine.checkpoint.safetensors_file import read_shapes
from engine.checkpoint.weight_files import find_weights
from engine.config import JupiterConfig, load_config, parse_config
from engine.decoding.accept import GREEDY, NUCLEUS, TYPICAL, AcceptRule
from engine.model.config import ModelConfig
from engine.model.medusa import MedusaLlamaForCausalLM, fuse_projections
from engine.pipeline.batch import Entry, Judge
from engine.pipeline.build import build_stage, make_plan
from engine.pipeline.memory import weights_bytes
from engine.pipeline.stage import Stage
from engine.planning import read_sizes, stage_sizes
from tests.tiny import tiny_folder

CPU = torch.device("cpu")


def tiny_config(folder: Path, split: list[int], **values: Any) -> JupiterConfig:
    base = {"base_model_name_or_path": str(folder), "stage_num_hidden_layers_list": split}
    return parse_config({**base, **values}, "a test")


def build(config: JupiterConfig, folder: Path) -> list[Stage]:
    plan = make_plan(config, folder)
    return [build_stage(plan, r, CPU, lambda *_: None) for r in range(config.world_size)]


def tiny_heads(folder: Path, *, own_output: bool) -> Path:
    tensors = {}
    for head in range(3):
        tensors[f"medusa_head.{head}.0.linear.weight"] = torch.zeros(32, 32)
        tensors[f"medusa_head.{head}.0.linear.bias"] = torch.zeros(32)
        if own_output:
            tensors[f"medusa_head.{head}.1.weight"] = torch.zeros(260, 32)
    write_heads(folder, tensors, "fasterdecoding" if own_output else "v2")
    return folder


@pytest.mark.parametrize("kind", ["llama", "linear_rope", "mistral", "qwen2"])
@pytest.mark.parametrize("split", [[6], [2, 4], [1, 3, 2]])
def test_weights_and_kv_are_those_of_the_built_stages(kind: str, split: list[int]) -> None:
    folder = tiny_folder(kind)
    config = tiny_config(folder, split, max_kv_cache_length=300)
    for stage, size in zip(build(config, folder), stage_sizes(folder, config), strict=True):
        assert size.weights == weights_bytes(stage)
        assert size.kv() == stage.store.nbytes  # the warm-up has made the first sequence's
        for slot in range(5):
            stage.store.find(slot)
            assert size.kv(slot + 1) == size.kv_per_sequence * (1, 2, 4, 4, 8)[slot]
        assert stage.store.nbytes == size.kv(5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["llama", "linear_rope", "mistral", "qwen2"])
def test_quantized_weights_are_those_of_the_built_stages(
    tmp_path: Path, kind: str, bits: int
) -> None:
    folder, heads = tiny_folder(kind), tiny_heads(tmp_path / "heads", own_output=True)
    values = {f"load_in_{bits}bit": True, "medusa_head_path": str(heads)}
    for split in ([6], [2, 4]):
        config = tiny_config(folder, split, **values)
        sizes = [size.weights for size in stage_sizes(folder, config)]
        assert sizes == [weights_bytes(stage) for stage in build(config, folder)]


@pytest.mark.parametrize("own_output", [True, False])
def test_heads_count_on_the_last_stage_and_as_many_as_are_used(
    tmp_path: Path, own_output: bool
) -> None:
    folder, heads = tiny_folder(), tiny_heads(tmp_path / "heads", own_output=own_output)
    for used in (3, 1, 0):
        values = {"medusa_head_path": str(heads), "medusa_num_heads": used}
        config = tiny_config(folder, [3, 3], torch_dtype="bfloat16", **values)
        first, last = stage_sizes(folder, config)
        assert [first.weights, last.weights] == [weights_bytes(s) for s in build(config, folder)]
        assert first.heads == 0 and bool(last.heads) == bool(used)
        assert first.holds == ("embedding",)
        named = {3: ("3 heads",), 1: ("1 head",), 0: ()}[used]
        assert last.holds == ("norm", "lm_head", *named)


def test_a_tied_output_layer_counts_twice_only_where_there_are_two_copies() -> None:
    folder = tiny_folder("llama")
    sizes = read_sizes(folder, tiny_config(folder, [6]))
    (whole,) = sizes.stages([6])
    halves = sizes.stages([3, 3])
    assert sum(stage.weights for stage in halves) - whole.weights == 260 * 32 * 4


def peak_bytes(work: Any) -> int:
    """The most memory that tensors made by `work` take at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inner", [128, 1024])
def test_activations_are_near_the_measured_peak_of_the_largest_step(
    tmp_path: Path, dtype: str, inner: int
) -> None:
    # Wide enough that the tensors outweigh what is counted in rows and entries.
    config = tiny_config(tmp_path, [1, 1], torch_dtype=dtype, max_kv_cache_length=512)
    first, _ = wide_stages(tmp_path, config, inner)
    chunk = Entry(0, 384, [5] * 128, list(range(-1, 127)), Judge.NONE)
    middle = peak_bytes(lambda: first.run([chunk], None))
    assert 0.8 < middle / stage_sizes(tmp_path, config)[0].activations < 1.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", [GREEDY, TYPICAL, NUCLEUS])
def test_judging_stays_within_what_is_foreseen_for_it(
    tmp_path: Path, dtype: str, rule: int
) -> None:
    config = tiny_config(tmp_path, [1, 1], torch_dtype=dtype, max_kv_cache_length=512)
    first, last = wide_stages(tmp_path, config, 128, vocabulary=20000)
    rules = AcceptRule(rule, 0.7, 0.8, 0.09, 0.3, 1)
    tree = Entry(0, 500, [5], [-1], Judge.TREE, rule=rules)
    hidden = first.run([tree], None)
    end = peak_bytes(lambda: last.judge([tree], last.run([tree], hidden)))
    assert end < 1.1 * read_sizes(tmp_path, config).judging


def wide_stages(
    folder: Path, config: JupiterConfig, inner: int, vocabulary: int = 260
) -> list[Stage]:
    """Two stages with nothing in their weights, of a model described in `folder`."""
    values = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": 256,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    (folder / "config.json").write_text(json.dumps(values))
    dtype = getattr(torch, config.torch_dtype)
    stages = []
    for rank in range(2):
        ends = {"first": rank == 0, "last": rank == 1}
        model = MedusaLlamaForCausalLM(
            ModelConfig.from_folder(folder), layers=range(rank, rank + 1), **ends
        )
        model.to(dtype).eval().requires_grad_(False)
        fuse_projections(model)
        stages.append(Stage(model, context_length=512, dtype=dtype, device=CPU, **ends))
        stages[-1].store.find(0)
    return stages


def test_the_default_models_stages_add_up_to_its_checkpoint(default_model: Path) -> None:
    root = Path(__file__).parents[2]
    config = load_config(
        str(root / "config.json"), assignments=["load_in_8bit=false"], no_heads=True
    )
    stored = {
        name: shape
        for file in find_weights(default_model).files
        for name, shape in read_shapes(file).items()
    }
    model = ModelConfig.from_folder(default_model)
    assert model.tie_word_embeddings
    stored.pop("lm_head.weight", None)
    sizes = read_sizes(default_model, config)
    whole = 4 * sum(math.prod(shape) for shape in stored.values())
    assert sizes.stages([30])[0].weights == whole
    for split in ([15, 15], [10, 10, 10]):
        stages = sizes.stages(split)
        assert sum(stage.weights for stage in stages) == whole + stages[-1].lm_head
        assert stages[-1].lm_head == 4 * math.prod(stored["model.embed_tokens.weight"])
