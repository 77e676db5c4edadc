"""What can be known to be wrong before any process is started. Torch-free."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from engine.checkpoint.head_layouts import HeadSpec, check_heads, inspect_heads
from engine.checkpoint.sources import local_folder
from engine.checkpoint.weight_files import check_tokenizer, check_whole
from engine.config import JupiterConfig
from engine.errors import CheckpointError, ConfigError
from engine.model.config import ModelConfig

# Keys of a model's config.json that change nothing in what the model computes.
# fmt: off
HARMLESS = frozenset((
    "_name_or_path", "architectures", "initializer_range", "pad_token_id",
    "transformers_version", "use_cache",
))
# fmt: on


def preflight(config: JupiterConfig, folder: Path) -> ModelConfig:
    """Check `config` against the model in `folder`, and the model's and the heads' files.

    `max_kv_cache_length` beyond the model's context and a preset tree deeper than the heads are
    no errors: both are cut to what there is.

    Raises:
        ConfigError: a key of the config that does not fit; it is named with both values.
        CheckpointError: a file that is missing, damaged or of another kind; it is named.
    """
    model = ModelConfig.from_folder(folder)
    _check_split(config, model, folder)
    _check_model_keys(config.model_keys, model, folder)
    _check_quantization(config)
    check_whole(folder)
    check_tokenizer(folder)
    found = find_heads(config, folder)
    if found is not None:
        path, spec = found
        check_heads(spec, model, path)
        _check_tree(config, spec)
    return model


def find_heads(config: JupiterConfig, folder: Path) -> tuple[Path, HeadSpec] | None:
    """The Medusa heads that `config` asks for, and what they are; None without heads.

    They are those of `medusa_head_path`, or else those merged into the model in `folder`.
    `medusa_num_heads` takes the first so many; 0 means none.

    Raises:
        CheckpointError: there are none at `medusa_head_path`, or they are damaged.
    """
    if config.medusa_num_heads == 0:
        return None
    if config.medusa_head_path is not None:
        path = local_folder(config.medusa_head_path)
    elif is_merged(folder):
        path = folder
    else:
        return None
    return path, inspect_heads(path).first(config.medusa_num_heads)


def is_merged(folder: Path) -> bool:
    """Whether the model in `folder` says that it has Medusa heads in it."""
    return bool(_raw_config(folder).get("medusa_num_heads"))


def _raw_config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return values


def _check_split(config: JupiterConfig, model: ModelConfig, folder: Path) -> None:
    split = config.stage_num_hidden_layers_list
    layers = model.num_hidden_layers
    if len(split) > layers:
        raise ConfigError(
            f"key 'stage_num_hidden_layers_list': {len(split)} stages are more than "
            f"the {layers} layers of the model in {folder}"
        )
    if sum(split) != layers and not config.auto_split:
        raise ConfigError(
            f"key 'stage_num_hidden_layers_list': {split} adds up to {sum(split)} layers, "
            f"but the model in {folder} has {layers}"
        )


def _check_model_keys(given: dict[str, Any], model: ModelConfig, folder: Path) -> None:
    """The model's keys that the original repeated in its own file must not contradict it."""
    raw = _raw_config(folder)
    for key, value in given.items():
        if key in HARMLESS:
            continue
        known = getattr(model, key) if hasattr(model, key) else raw.get(key)
        if not _same(_normal(key, value, model, raw), known):
            # transformers 5 spells the two rope keys in another way.
            theirs = raw.get(key) or (raw.get("rope_parameters") if "rope" in key else None)
            shown = known if theirs is None else theirs
            raise ConfigError(
                f"key '{key}': {json.dumps(value)} contradicts {folder / 'config.json'}, "
                f"which has {json.dumps(shown, default=str)}; correct the key or leave it out"
            )


def _check_quantization(config: JupiterConfig) -> None:
    """On a named GPU; with `auto` only the stage itself knows its device."""
    bits = config.weight_bits
    if bits is None or not config.device.startswith("cuda"):
        return
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            f"key 'load_in_{bits}bit': on cuda this needs the package torchao (pip install torchao)"
        )
    if bits == 4 and config.torch_dtype != "bfloat16":
        raise ConfigError(
            f"key 'load_in_4bit': on cuda torch_dtype must be bfloat16, not {config.torch_dtype}"
        )


def _normal(key: str, value: Any, model: ModelConfig, raw: dict[str, Any]) -> Any:
    """`value` in the form that ModelConfig keeps it in."""
    if key == "eos_token_id":
        return tuple(value) if isinstance(value, list) else () if value is None else (value,)
    if key == "rope_scaling":
        plain = {name: item for name, item in raw.items() if name != "rope_parameters"}
        try:
            return ModelConfig.from_dict({**plain, key: value}, f"key '{key}'").rope_scaling
        except CheckpointError as error:
            raise ConfigError(str(error)) from None
    if key in ("head_dim", "num_key_value_heads") and value is None:
        return getattr(model, key)  # derived from others
    return value


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, float) or isinstance(right, float):
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        # Written by people as 1e-05, by converters as the nearest float32.
        return numbers and math.isclose(left, right, rel_tol=1e-6)
    return bool(left == right)


def _check_tree(config: JupiterConfig, spec: HeadSpec) -> None:
    if isinstance(config.medusa_choices, str):
        return
    if not config.medusa_choices:  # the schema forbids it in a file, not in code
        raise ConfigError(
            "key 'medusa_choices': no paths; list at least one, such as [[0]], or use \"auto\", or "
            "medusa_head_path null for plain decoding"
        )
    deepest = max(config.medusa_choices, key=len)
    if len(deepest) > spec.num_heads:
        raise ConfigError(
            f"key 'medusa_choices': path {deepest} needs {len(deepest)} Medusa heads, "
            f"but there are {spec.num_heads}"
        )
