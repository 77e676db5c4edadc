"""What is known to be wrong before a process is started, each in one clear line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from engine.checkpoint.heads import write_heads
from engine.checkpoint.preflight import preflight
from engine.config import JupiterConfig, parse_config
from engine.errors import CheckpointError, ConfigError
from tests.tiny import KINDS, reference, save, tiny_folder


def config(**values: Any) -> JupiterConfig:
    base = {"base_model_name_or_path": "any", "stage_num_hidden_layers_list": [1, 2]}
    return parse_config({**base, **values}, "a test")


def heads(folder: Path, count: int, *, width: int = 32, rows: int = 260) -> str:
    write_heads(
        folder, {f"medusa_head.{h}.0.weight": torch.zeros(rows, width) for h in range(count)}
    )
    return str(folder)


@pytest.mark.parametrize("kind", [*KINDS])
def test_a_good_config_passes(kind: str) -> None:
    assert preflight(config(), tiny_folder(kind, 3)).num_hidden_layers == 3


def test_preflight_needs_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from engine.checkpoint.preflight import preflight\n"
        "from engine.config import parse_config\n"
        "values = {'base_model_name_or_path': 'x', 'stage_num_hidden_layers_list': [3]}\n"
        f"preflight(parse_config(values, 'x'), Path({str(tiny_folder('llama', 3))!r}))\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_a_split_that_does_not_add_up_names_both_numbers_and_the_list() -> None:
    with pytest.raises(ConfigError, match=r"\[1, 1\] adds up to 2 layers, but .* has 3"):
        preflight(config(stage_num_hidden_layers_list=[1, 1]), tiny_folder("llama", 3))


def test_quantizing_on_a_gpu_needs_torchao_and_for_four_bits_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tiny_folder("llama", 3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'load_in_8bit': on cuda .* torchao"):
        preflight(config(load_in_8bit=True, device="cuda"), folder)
    preflight(config(load_in_8bit=True, device="cpu"), folder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"'load_in_4bit': .* bfloat16, not float32"):
        preflight(config(load_in_4bit=True, device="cuda:0"), folder)
    preflight(config(load_in_4bit=True, device="cuda", torch_dtype="bfloat16"), folder)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"4 stages are more than the 3 layers"):
        preflight(config(stage_num_hidden_layers_list=[1] * 4), tiny_folder("llama", 3))


def test_the_models_own_keys_may_be_repeated() -> None:
    for kind in KINDS:
        folder = tiny_folder(kind, 3)
        values = json.loads((folder / "config.json").read_text())
        rope = values["rope_parameters"]
        known = parse_config(
            {
                "base_model_name_or_path": "any",
                "stage_num_hidden_layers_list": [3],
                "rope_theta": rope["rope_theta"],
                "rope_scaling": None if rope["rope_type"] == "default" else rope,
                "hidden_size": 32,
                "hidden_act": "silu",
                "head_dim": None,
                "model_type": values["model_type"],
                "num_attention_heads": 4,
                "rms_norm_eps": values["rms_norm_eps"] * (1 + 1e-8),
                "eos_token_id": 259,
                "tie_word_embeddings": values["tie_word_embeddings"],
                # These change nothing in what the model computes.
                "architectures": ["MedusaLlamaForCausalLM"],
                "transformers_version": "4.30",
                "use_cache": False,
                "pad_token_id": 0,
                "_name_or_path": "elsewhere",
                "initializer_range": 1.0,
            },
            "a test",
        )
        preflight(known, folder)


@pytest.mark.parametrize(
    ("key", "value", "theirs"),
    [
        ("hidden_size", 64, "32"),
        ("num_hidden_layers", 32, "3"),
        ("num_attention_heads", 8, "4"),
        ("vocab_size", 32000, "260"),
        ("rms_norm_eps", 1e-5, "1e-06"),
        ("rope_theta", 1e6, "10000.0"),
        ("model_type", "qwen2", '"llama"'),
        ("tie_word_embeddings", False, "true"),
        ("eos_token_id", [1, 2], "259"),
        ("hidden_act", "gelu", '"silu"'),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "default"),
    ],
)
def test_a_contradicting_key_is_named_with_both_values(key: str, value: Any, theirs: str) -> None:
    folder = tiny_folder("llama", 3)
    with pytest.raises(ConfigError) as caught:
        preflight(config(**{key: value}), folder)
    text = str(caught.value)
    assert text.startswith(f"key '{key}': {json.dumps(value)} contradicts {folder}/config.json")
    assert theirs in text.partition("which has")[2]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = save(reference(layers=3), tmp_path)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(folder))}.*{re.escape(name)}"):
        preflight(config(), folder)


def test_a_torn_weight_file_is_named(tmp_path: Path) -> None:
    folder = save(reference(layers=3), tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cut short: \d+ bytes"):
        preflight(config(), folder)


def test_heads_must_fit_the_model(tmp_path: Path) -> None:
    folder = tiny_folder("llama", 3)
    preflight(config(medusa_head_path=heads(tmp_path / "good", 2)), folder)
    with pytest.raises(CheckpointError, match="width 64, but the model's hidden_size is 32"):
        preflight(config(medusa_head_path=heads(tmp_path / "wide", 2, width=64)), folder)
    with pytest.raises(CheckpointError, match="100 output rows, but the model's vocab_size is 260"):
        preflight(config(medusa_head_path=heads(tmp_path / "rows", 2, rows=100)), folder)
    with pytest.raises(CheckpointError, match="no such folder or file"):
        preflight(config(medusa_head_path=str(tmp_path / "none")), folder)


def test_explicit_paths_are_not_deeper_than_the_heads(tmp_path: Path) -> None:
    folder = tiny_folder("llama", 3)
    path = heads(tmp_path, 2)
    deep = [[0], [0, 0], [0, 0, 1]]
    preflight(config(medusa_head_path=path, medusa_choices=deep[:2]), folder)
    preflight(config(medusa_head_path=path, medusa_choices="mc_63"), folder)  # trimmed later
    preflight(config(medusa_choices=deep), folder)  # no heads, no tree
    with pytest.raises(ConfigError, match="'medusa_choices': no paths"):
        preflight(replace(config(medusa_head_path=path), medusa_choices=[]), folder)
    with pytest.raises(ConfigError, match=r"\[0, 0, 1\] needs 3 Medusa heads, but there are 2"):
        preflight(config(medusa_head_path=path, medusa_choices=deep), folder)
    with pytest.raises(ConfigError, match=r"\[0, 0\] needs 2 Medusa heads, but there are 1"):
        preflight(
            config(medusa_head_path=path, medusa_num_heads=1, medusa_choices=deep[:2]), folder
        )


def test_a_longer_cache_than_the_context_is_no_error() -> None:
    preflight(config(max_kv_cache_length=1 << 20), tiny_folder("llama", 3))
