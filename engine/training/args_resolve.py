"""What the model itself says about a training run, put in the place of None. Free of torch."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.model.config import ROPE_TYPES, ModelConfig, RopeScaling, check_divides
from engine.training.args import TrainArguments, model_source
from engine.training.args_fields import show

SAVE_ROOT = "megatron_output"


def with_model(args: TrainArguments, model: ModelConfig, folder: Path) -> TrainArguments:
    """The arguments with what the model in `folder` says in the place of None.

    From scratch, `model` is what `shaped` makes of it.

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
    check_divides(model, args.tensor_model_parallel_size)
    if args.truncated_vocab_size is not None and args.truncated_vocab_size > model.vocab_size:
        raise ConfigError(
            f"--truncated_vocab_size {args.truncated_vocab_size}: "
            f"the vocabulary has {model.vocab_size} tokens"
        )
    seq_length, stored = args.seq_length or context, _stored_dtype(folder)
    return dataclasses.replace(
        args,
        **{name: value for name, value in shape.items() if name != "padded_vocab_size"},
        seq_length=seq_length,
        max_length=min(args.max_length or seq_length, seq_length),
        bf16=stored == "bfloat16" and not args.fp16 if args.bf16 is None else args.bf16,
        fp16=stored == "float16" and not args.bf16 if args.fp16 is None else args.fp16,
        save=args.save or str(Path(SAVE_ROOT) / model_suffix(model_source(args))),
        lr_decay_iters=args.lr_decay_iters or args.train_iters,
        eval_interval=args.eval_interval or args.save_interval,
    )


def shaped(args: TrainArguments, model: ModelConfig) -> ModelConfig:
    """The model that training from scratch begins with: `model` but for what the arguments say.

    Raises:
        ConfigError: sizes that do not fit each other, with the numbers.
    """
    if not args.from_scratch:
        return model
    heads = args.num_attention_heads or model.num_attention_heads
    groups = model.num_key_value_heads if args.num_attention_heads is None else heads
    if args.group_query_attention is not False and args.num_query_groups is not None:
        groups = args.num_query_groups
    width = args.hidden_size or model.hidden_size
    changed = args.hidden_size is not None or args.num_attention_heads is not None
    head_dim = width // heads if changed else model.head_dim
    if (changed and width % heads) or heads % groups or head_dim % 2:
        raise ConfigError(
            f"--num_attention_heads {heads}: hidden_size {width} and num_query_groups {groups} "
            "do not fit; heads divide the width into even parts, and groups the heads"
        )
    fields: dict[str, Any] = {
        "num_hidden_layers": args.num_layers,
        "hidden_size": width,
        "intermediate_size": args.ffn_hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if args.group_query_attention is False else groups,
        "head_dim": head_dim,
        "max_position_embeddings": args.max_position_embeddings,
        "rope_theta": args.rotary_base,
        "rms_norm_eps": args.norm_epsilon,
        "tie_word_embeddings": _not(args.untie_embeddings_and_output_weights),
        "attention_bias": args.add_qkv_bias,
        "mlp_bias": _not(args.disable_bias_linear),
        "attention_out_bias": _not(args.disable_bias_linear),
        "rope_scaling": None if args.rope_scaling is None else _scaling(args.rope_scaling),
    }
    return dataclasses.replace(model, **{k: v for k, v in fields.items() if v is not None})


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


def _scaling(text: str) -> RopeScaling:
    values = _scaling_values(text)
    names = {field.name for field in dataclasses.fields(RopeScaling)}
    unknown = values.keys() - names - {"rope_theta"}
    if unknown or values.get("rope_type", "default") not in ROPE_TYPES:
        raise ConfigError(
            f"--rope_scaling {text}: rope_type is one of {', '.join(ROPE_TYPES)}, "
            f"with {', '.join(sorted(names))}"
        )
    return RopeScaling(**{k: v for k, v in values.items() if k in names})


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
    values = json.loads(known or "{}")
    return all(values.get(key) == value for key, value in _scaling_values(text).items())


def _scaling_values(text: str) -> dict[str, Any]:
    try:
        asked = json.loads(text)
    except ValueError:
        asked = None
    if not isinstance(asked, dict):
        raise ConfigError(f"--rope_scaling {text}: must be a JSON object")
    return {("rope_type" if key == "type" else key): value for key, value in asked.items()}


def _check_stages(args: TrainArguments, model: ModelConfig) -> None:
    layers, stages = model.num_hidden_layers, args.pipeline_model_parallel_size
    parts = stages * args.pipeline_chunks
    if parts > layers:
        name = "pipeline" if args.pipeline_chunks == 1 else "virtual_pipeline"
        size = stages if args.pipeline_chunks == 1 else args.pipeline_chunks
        raise ConfigError(
            f"--{name}_model_parallel_size {size}: the model has only {layers} layers"
            + ("" if args.pipeline_chunks == 1 else f" for {parts} parts")
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
