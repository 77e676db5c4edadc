"""`jupiter merge`: base and heads in one folder that loads again, here and in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine.checkpoint.heads import read_heads, write_heads
from engine.checkpoint.merge import merge
from engine.checkpoint.preflight import find_heads, preflight
from engine.cli.main import main
from engine.config import load_config, parse_config
from engine.errors import CheckpointError
from tests.tiny import reference, tiny_folder

HEADS = {
    "medusa_head.0.0.linear.weight": torch.randn(32, 32),
    "medusa_head.0.0.linear.bias": torch.randn(32),
    "medusa_head.0.1.weight": torch.randn(260, 32),
    "medusa_head.1.0.linear.weight": torch.randn(32, 32),
    "medusa_head.1.0.linear.bias": torch.randn(32),
    "medusa_head.1.1.weight": torch.randn(260, 32),
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config file that names a tiny model and heads for it."""
    write_heads(tmp_path / "heads", HEADS)
    values = {
        "base_model_name_or_path": str(tiny_folder("mistral", 3)),
        "medusa_head_path": str(tmp_path / "heads"),
        "stage_num_hidden_layers_list": [3],
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path / "config.json"


def test_the_command_writes_a_folder_that_transformers_loads_the_base_from(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    assert main(["merge", "--output_dir", str(output), "--config_file", str(config)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    base = tiny_folder("mistral", 3)
    assert {path.name for path in output.iterdir()} == {path.name for path in base.iterdir()}
    assert (output / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    expected = reference("mistral", layers=3).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(output).state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    stored = load_file(output / "model.safetensors")
    assert stored.keys() == expected.keys() | HEADS.keys()
    values = json.loads((output / "config.json").read_text())
    assert (values["medusa_num_heads"], values["medusa_num_layers"]) == (2, 1)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_merged_model_brings_its_own_heads(tmp_path: Path, config: Path) -> None:
    merged = tmp_path / "merged"
    assert main(["merge", "--output_dir", str(merged), "--config_file", str(config)]) == 0
    values = {"base_model_name_or_path": str(merged), "stage_num_hidden_layers_list": [1, 2]}
    found = find_heads(parse_config(values, "a test"), merged)
    assert found is not None and found[0] == merged and found[1].num_heads == 2
    assert preflight(parse_config(values, "a test"), merged).num_hidden_layers == 3
    none = parse_config({**values, "medusa_num_heads": 0}, "a test")
    assert find_heads(none, merged) is None
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert find_heads(load_config(str(tmp_path / "config.json"), no_heads=True), merged) is None


def test_heads_can_be_merged_anew_and_into_shards(tmp_path: Path) -> None:
    write_heads(tmp_path / "heads", HEADS)
    base = tiny_folder("qwen2", 3)
    merge(base, tmp_path / "heads", tmp_path / "one", max_heads=1)
    assert read_heads(tmp_path / "one").keys() == {n for n in HEADS if ".0." in n[:14]}
    merge(tmp_path / "one", tmp_path / "heads", tmp_path / "two", shard_bytes=50_000)
    assert len(list((tmp_path / "two").glob("model-*-of-*.safetensors"))) > 1
    heads = read_heads(tmp_path / "two")
    assert heads.keys() == HEADS.keys()
    assert all(torch.equal(heads[name], HEADS[name]) for name in HEADS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "two").state_dict()
    for name, tensor in reference("qwen2", layers=3).state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_the_dtype_can_be_chosen(tmp_path: Path, config: Path) -> None:
    output = tmp_path / "half"
    words = ["merge", "--output_dir", str(output), "--torch_dtype", "bfloat16"]
    assert main([*words, "--config", str(config)]) == 0
    stored = load_file(output / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16


def test_a_token_map_is_merged_too(tmp_path: Path) -> None:
    cut = {n: t[:3] if n.endswith("1.weight") else t for n, t in HEADS.items()}
    cut["token_map"] = torch.tensor([7, 259, 0])
    write_heads(tmp_path / "heads", cut, "vllm", vocab_size=260)
    merge(tiny_folder("qwen2", 3), tmp_path / "heads", tmp_path / "merged")
    heads = read_heads(tmp_path / "merged")
    assert heads.keys() == cut.keys()
    assert torch.equal(heads["token_map"], cut["token_map"])


def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    assert main(["merge", "--output_dir", str(full), "--config", str(config)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in full.iterdir()] == ["something"]

    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "medusa_head_path": None}))
    assert main(["merge", "--output_dir", str(tmp_path / "x"), "--config", str(config)]) == 2
    assert "medusa_head_path" in capsys.readouterr().err

    with pytest.raises(CheckpointError, match="width 16, but the model's hidden_size is 32"):
        write_heads(tmp_path / "narrow", {"medusa_head.0.0.weight": torch.zeros(260, 16)})
        merge(tiny_folder("qwen2", 3), tmp_path / "narrow", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_empty_folder_is_taken_and_a_failure_half_way_leaves_it_empty(tmp_path: Path) -> None:
    write_heads(tmp_path / "heads", HEADS)
    output = tmp_path / "merged"
    output.mkdir()

    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    base = tiny_folder("qwen2", 3)
    with pytest.raises(KeyboardInterrupt):
        merge(base, tmp_path / "heads", output, progress=fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads", "merged"]
    assert not any(output.iterdir())
    merge(base, tmp_path / "heads", output)
    assert (output / "model.safetensors").is_file()
