"""config.json: lookup, the original's file, and what a bad value says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import config_json, find_config, load_config, parse_config
from engine.errors import ConfigError

GOOD = {"base_model_name_or_path": "some/model", "stage_num_hidden_layers_list": [2, 2]}
# The keys of the original's one config file, which holds the model's own keys too.
ORIGINAL = {
    "_name_or_path": "medusa-vicuna-7b-v1.3",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "do_sample": True,
    "fast": True,
    "max_steps": 100,
    "temperature": 0.7,
    "posterior_threshold": 0.09,
    "posterior_alpha": 0.3,
    "top_p": 0.8,
    "sampling": "typical",
    "medusa_num_heads": 5,
    "medusa_num_layers": 1,
    "medusa_head_path": "./model/medusa_head",
    "base_model_name_or_path": "./model/vicuna-7b-v1.3",
    "init_method": "tcp://127.0.0.1:23000",
    "distributed_backend": "gloo",
    "stage_num_hidden_layers_list": [8, 8, 8, 8],
    "device": "cuda",
    "torch_dtype": "bfloat16",
    "num_sub_sequences": 5,
    "sub_sequence_length": 128,
    "max_kv_cache_length": 2048,
}


def write(folder: Path, values: Any) -> str:
    path = folder / "config.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


def test_the_originals_file_loads_as_it_is(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, ORIGINAL))
    assert config.world_size == 4
    assert config.max_steps == 100
    assert config.max_sub_sequence_len == 128
    assert config.model_keys["hidden_size"] == 4096
    assert config.sampling == "typical"


def test_do_sample_false_means_greedy() -> None:
    assert parse_config({**ORIGINAL, "do_sample": False}, "x").sampling == "greedy"


def test_the_default_config_loads_and_serves_two_stages() -> None:
    config = load_config(str(Path(__file__).parents[2] / "config.json"))
    assert config.stage_num_hidden_layers_list == [15, 15]


def test_a_config_survives_its_own_json() -> None:
    config = parse_config({**ORIGINAL, "medusa_choices": [[0], [0, 1]]}, "x")
    assert parse_config(json.loads(config_json(config)), "x") == config


def test_lookup_prefers_the_flag_then_the_folder_then_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(None).name == "config.json"
    assert load_config().base_model_name_or_path.startswith("pypi:")
    write(tmp_path, GOOD)
    assert load_config().base_model_name_or_path == "some/model"
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**GOOD, "base_model_name_or_path": "other/model"}))
    assert load_config(str(other)).base_model_name_or_path == "other/model"


def test_relative_paths_are_also_looked_up_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    path = write(tmp_path, {**GOOD, "base_model_name_or_path": "weights"})
    assert load_config(path).base_model_name_or_path == str(tmp_path / "weights")


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, {**GOOD, "medusa_head_path": "heads"})
    config = load_config(path, stages="1,1,2", assignments=["temperature=0", "device=cpu"])
    assert config.stage_num_hidden_layers_list == [1, 1, 2]
    assert (config.temperature, config.device) == (0, "cpu")
    assert load_config(path, no_heads=True).medusa_head_path is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temprature": 1}, ["unknown key 'temprature'", "did you mean 'temperature'"]),
        ({"sampling": "best"}, ["'sampling'", "greedy, typical, nucleus", '"best"']),
        ({"temperature": -1}, ["'temperature'", ">= 0", "-1"]),
        ({"stage_num_hidden_layers_list": [3, 0]}, ["'stage_num_hidden_layers_list'", ">= 1"]),
        ({"stage_num_hidden_layers_list": []}, ["'stage_num_hidden_layers_list'", "length >= 1"]),
        ({"medusa_choices": "mc_99"}, ["'medusa_choices'", "auto, mc_16, mc_63"]),
        ({"torch_dtype": "int8"}, ["'torch_dtype'", "float32, bfloat16, float16"]),
        ({"init_method": "127.0.0.1:5"}, ["'init_method'", "tcp"]),
        ({"load_in_8bit": True, "load_in_4bit": True}, ["'load_in_8bit'", "only one can be true"]),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_key(
    tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    path = write(tmp_path, {**GOOD, **change})
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(path)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1,\n "b" 2}', ["line 2", "not JSON"]),
        ("[1]", ["one JSON object"]),
        ('{"stage_num_hidden_layers_list": [1]}', ["'base_model_name_or_path' is missing"]),
        ('{"architectures": ["LlamaForCausalLM"]}', ["a model's own config.json", "--config"]),
        ("[" * 100_000, ["cannot be read"]),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("stages", ["", "15;15", "a,b", "15,,15"])
def test_a_bad_stages_flag_shows_the_form(tmp_path: Path, stages: str) -> None:
    with pytest.raises(ConfigError, match="15,15"):
        load_config(write(tmp_path, GOOD), stages=stages)


def test_a_bad_set_flag_shows_the_form(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        load_config(write(tmp_path, GOOD), assignments=["temperature"])


def test_a_split_of_auto_has_a_number_of_stages_and_comes_back_from_json() -> None:
    auto = {**GOOD, "stage_num_hidden_layers_list": "auto"}
    config = parse_config(auto, "test")
    assert config.auto_split and config.world_size == 2
    assert parse_config(json.loads(config_json(config)), "test") == config
    assert parse_config({**auto, "num_stages": 3}, "test").world_size == 3
    planned = msgspec.structs.replace(config, stage_num_hidden_layers_list=[1, 3])
    assert not planned.auto_split
    again = parse_config(json.loads(config_json(planned)), "test")
    assert again.stage_num_hidden_layers_list == [1, 3] and not again.auto_split


def test_stages_auto_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**GOOD, "stage_num_hidden_layers_list": [2, 2, 2]}))
    assert load_config(str(path), stages="auto").num_stages == 3  # as many as there were
    assert load_config(str(path), stages="auto:4").world_size == 4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stage_num_hidden_layers_list": "auto", "num_stages": 0}, "'num_stages'"),
        ({"num_stages": 3}, "has 2 entries"),
        ({"stage_num_hidden_layers_list": "even"}, "stage_num_hidden_layers_list"),
        ({"prefill_plan": {"100": [50, 40]}}, "'prefill_plan'"),
        ({"plan_aim": "speed"}, "ttft, latency, throughput"),
    ],
)
def test_planning_keys_are_refused_by_name(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config({**GOOD, **values}, "test")
