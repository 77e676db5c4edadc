"""What the model itself says about a training run, put in the place of None. Free of torch."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.model.config import ModelConfig, RopeScaling
from engine.training.args import TrainArguments, model_source
from engine.training.args_fields import show

SAVE_ROOT = "megatron_output"


def with_model(args: TrainArguments, model: ModelConfig, folder: Path) -> TrainArguments:
    """The arguments with what the model in `folder` says in the place of None.

    Sets seq_length, max_length, bf16, save, lr_decay_iters (where train_iters is set),
    eval_interval and the model's shape.

    Raises:
        ConfigError: an argument that contradicts the model; both values are named.
    """
    shape = _shape(model)
    for name, value in shape.items():
        asked = getattr(args, name)
        if asked is not None and not _agrees(name, asked, value):
            raise ConfigError(f"--{name} {show(asked)}: the model in {folder} has {show(value)}")
    context = model.context_limit
    for name in ("seq_length", "max_length"):
        asked = getattr(args, name)
        if asked is not None and asked > context:
            raise ConfigError(f"--{name} {asked}: the model's context is {context} tokens")
    _check_stages(args, model)
    if args.truncated_vocab_size is not None and args.truncated_vocab_size > model.vocab_size:
        raise ConfigError(
            f"--truncated_vocab_size {args.truncated_vocab_size}: "
            f"the vocabulary has {model.vocab_size} tokens"
        )
    seq_length = args.seq_length or context
    return dataclasses.replace(
        args,
        **{name: value for name, value in shape.items() if name != "padded_vocab_size"},
        seq_length=seq_length,
        max_length=min(args.max_length or seq_length, seq_length),
        bf16=_stored_dtype(folder) == "bfloat16" if args.bf16 is None else args.bf16,
        save=args.save or str(Path(SAVE_ROOT) / model_suffix(model_source(args))),
        lr_decay_iters=args.lr_decay_iters or args.train_iters,
        eval_interval=args.eval_interval or args.save_interval,
    )


def model_suffix(source: str) -> str:
    """The short name of a model's source, such as SmolLM2-135M for ORG/SmolLM2-135M."""
    return Path(source.removeprefix("pypi:").partition("==")[0]).name


def _shape(model: ModelConfig) -> dict[str, Any]:
    """The arguments of the group Model that the model itself answers."""
    scaling = model.rope_scaling
    return {
        "num_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.intermediate_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": model.num_key_value_heads != model.num_attention_heads,
        "num_query_groups": model.num_key_value_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "rotary_base": model.rope_theta,
        "norm_epsilon": model.rms_norm_eps,
        "untie_embeddings_and_output_weights": not model.tie_word_embeddings,
        "disable_bias_linear": not (model.mlp_bias or model.attention_out_bias),
        "add_qkv_bias": model.attention_bias,
        "padded_vocab_size": model.vocab_size,
        "rope_scaling": None if scaling.rope_type == "default" else _scaling_text(scaling),
    }


def _agrees(name: str, asked: Any, value: Any) -> bool:
    if name == "padded_vocab_size":
        return True  # named in a note: the vocabulary is not padded
    if name == "rope_scaling":
        return _same_scaling(asked, value)
    if isinstance(value, float):
        return math.isclose(asked, value, rel_tol=1e-6)  # written by people or by converters
    return bool(asked == value)


def _scaling_text(scaling: RopeScaling) -> str:
    return json.dumps(dataclasses.asdict(scaling))


def _same_scaling(text: str, known: str | None) -> bool:
    try:
        asked = json.loads(text)
    except ValueError:
        asked = None
    if not isinstance(asked, dict):
        raise ConfigError(f"--rope_scaling {text}: must be a JSON object")
    values = json.loads(known or "{}")
    plain = {("rope_type" if key == "type" else key): value for key, value in asked.items()}
    return all(values.get(key) == value for key, value in plain.items())


def _check_stages(args: TrainArguments, model: ModelConfig) -> None:
    layers, stages = model.num_hidden_layers, args.pipeline_model_parallel_size
    if stages > layers:
        raise ConfigError(
            f"--pipeline_model_parallel_size {stages}: the model has only {layers} layers"
        )
    split = args.stage_num_hidden_layers_list
    if split is not None and sum(split) != layers:
        raise ConfigError(
            f"--stage_num_hidden_layers_list {show(split)}: adds up to {sum(split)} layers, "
            f"the model has {layers}"
        )


def _stored_dtype(folder: Path) -> str:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(values.get("torch_dtype") or values.get("dtype"))
