"""What tensor parallelism asks of a model's shape."""

from __future__ import annotations

from engine.errors import ConfigError
from engine.model.config import ModelConfig

WORLD = 3
"""SmolLM2-135M has 9 heads and 3 KV heads."""


def check_cut(model: ModelConfig, world: int = WORLD) -> None:
    """Raise ConfigError where a model cannot be cut into `world` equal parts, or has biases."""
    parts = {
        "attention heads": model.num_attention_heads,
        "KV heads": model.num_key_value_heads,
        "inner columns": model.intermediate_size,
    }
    if model.attention_bias or model.attention_out_bias or model.mlp_bias:
        raise ConfigError("tensor parallelism is compared on models without biases")
    for name, count in parts.items():
        if count % world:
            raise ConfigError(f"{count} {name} cannot be cut into {world} equal parts")
