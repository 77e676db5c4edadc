"""What a checkpoint's own config.json says about the model, checked for what Jupiter supports."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, ConfigError, shown

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "MedusaLlamaForCausalLM": "llama",
}
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """Rotary embedding variants, in transformers' terms (`rope_scaling`)."""

    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-family model; names are those of Hugging Face's config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    max_position_embeddings: int
    sliding_window: int | None
    tie_word_embeddings: bool
    attention_bias: bool
    """q, k and v have biases (Qwen2, or a Llama that says so)."""
    attention_out_bias: bool
    """o_proj has a bias too (a Llama with `attention_bias`)."""
    mlp_bias: bool
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]

    @property
    def context_limit(self) -> int:
        """Tokens a sequence may have: within one sliding window, attention is full attention."""
        return min(
            self.max_position_embeddings, self.sliding_window or self.max_position_embeddings
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `folder/config.json`.

        Raises:
            CheckpointError: the file is missing or not JSON, a key is missing, or the
                architecture or a feature is one Jupiter does not support; it is named.
        """
        path = Path(folder) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing; a model folder needs a config.json") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: must hold one JSON object")
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Build from the keys of a Hugging Face config.json; `where` names it in errors."""
        named = values.get("architectures") or [None]
        architecture = named[0] if isinstance(named, list) else named
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{where}: architecture {shown(architecture)} is not supported; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        model_type = ARCHITECTURES[architecture]
        _refuse_features(values, where)
        try:
            return cls(**_fields(values, model_type, where))
        except KeyError as error:
            raise CheckpointError(f"{where}: key {error} is missing") from None
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None


def _fields(values: dict[str, Any], model_type: str, where: str) -> dict[str, Any]:
    heads = _count(values, "num_attention_heads")
    hidden = _count(values, "hidden_size")
    # transformers 5 writes rope_parameters {rope_type, rope_theta, ...}; older ones two keys.
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"key 'rope_scaling': must be an object, got {shown(rope)}")
    theta = _number(values if "rope_theta" in values else rope, "rope_theta", 10000.0)
    bias = model_type == "qwen2" or bool(values.get("attention_bias", False))
    kv_heads = _count(values, "num_key_value_heads", heads)
    head_dim = _count(values, "head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise ValueError(f"{heads} heads over {kv_heads} KV heads of width {head_dim} do not fit")
    uses_window = values.get("use_sliding_window", model_type == "mistral")
    window = values.get("sliding_window") if uses_window else None
    return {
        "model_type": model_type,
        "vocab_size": _count(values, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _count(values, "intermediate_size"),
        "num_hidden_layers": _count(values, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": _number(values, "rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(rope, where),
        "max_position_embeddings": _count(values, "max_position_embeddings", 2048),
        "sliding_window": None if window is None else _count(values, "sliding_window"),
        # transformers' defaults where the file is silent: false for all three families.
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", False)),
        "attention_bias": bias,
        "attention_out_bias": bias and model_type != "qwen2",
        "mlp_bias": bool(values.get("mlp_bias", False)),
        "pad_token_id": next(iter(_tokens(values, "pad_token_id")), None),
        "bos_token_id": next(iter(_tokens(values, "bos_token_id")), None),
        "eos_token_id": _tokens(values, "eos_token_id"),
    }


def check_divides(config: ModelConfig, ranks: int, *, vocabulary: bool = False) -> None:
    """Check that `ranks` tensor-parallel ranks can share a layer evenly.

    vocabulary: whether it too has to be cut into even parts.

    Raises:
        ConfigError: naming the numbers.
    """
    sizes = {
        "attention heads": config.num_attention_heads,
        "KV heads": config.num_key_value_heads,
        "MLP columns": config.intermediate_size,
    }
    if vocabulary:
        sizes["tokens of the vocabulary"] = config.vocab_size
    for what, size in sizes.items():
        if size % ranks:
            raise ConfigError(
                f"--tensor_model_parallel_size {ranks}: does not divide the model's {size} {what}"
            )


def _count(values: dict[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of at least 1; without a default, KeyError where it is missing."""
    value = values[key] if default is None else values.get(key) or default
    if isinstance(value, bool) or value != int(_number({key: value}, key)) or not 0 < value < 2**31:
        raise ValueError(f"key '{key}': must be a whole number of 1 or more, got {shown(value)}")
    return int(value)


def _number(values: dict[str, Any], key: str, default: float | None = None) -> float:
    value = values[key] if default is None else values.get(key, default)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"key '{key}': must be a number, got {shown(value)}")
    return float(value)


def _tokens(values: dict[str, Any], key: str) -> tuple[int, ...]:
    """Token ids: one, a list of them, or none."""
    value = values.get(key)
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in found):
        raise ValueError(f"key '{key}': must be token ids, got {shown(value)}")
    return tuple(found)


def _rope_scaling(rope: dict[str, Any], where: str) -> RopeScaling:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise CheckpointError(
            f"{where}: rope_scaling type {shown(kind)} is not supported; "
            f"supported: {', '.join(ROPE_TYPES)}"
        )
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", factor=_number(rope, "factor"))
    return RopeScaling(
        "llama3",
        factor=_number(rope, "factor"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_max_position_embeddings=_count(rope, "original_max_position_embeddings"),
    )


def _refuse_features(values: dict[str, Any], where: str) -> None:
    """Refuse by name what would make the output silently wrong."""
    act = values.get("hidden_act", "silu")
    if act != "silu":
        raise CheckpointError(f"{where}: hidden_act {shown(act)} is not supported; only 'silu'")
    if values.get("quantization_config"):
        raise CheckpointError(
            f"{where}: quantization_config: ready-quantized weights are not supported; "
            "use the float checkpoint"
        )
