"""Names and shapes of a model's tensors in Megatron-Core's layout, and what they are made of.

Layers are stacked on dim 0; q, k and v of each KV group lie together; gate comes before up. A
tensor-parallel rank holds whole KV groups. Anything else, such as Medusa heads, keeps its name.
Source: megatron-core 0.16.1, `GPTModel.sharded_state_dict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.model.config import ModelConfig

Kind = Literal["plain", "qkv", "gate_up"]
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
LAYERS = "decoder.layers."
WITH_EXTRA_STATE = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer for which Megatron-Core also keeps a state of their own (of fp8 scaling)."""


@dataclass(frozen=True)
class McoreTensor:
    """One tensor of the layout, or one layer's part of a stacked one."""

    key: str
    parts: tuple[str, ...]
    """Hugging Face's names of what it is made of."""
    shape: tuple[int, ...]
    """Of this layer's part, on one rank without tensor parallelism."""
    layer: int | None = None
    kind: Kind = "plain"
    split_dim: int | None = None
    """Dim of `shape` that tensor-parallel ranks share; None where each has all."""


def model_tensors(
    config: ModelConfig, layers: range | None = None, *, first: bool = True, last: bool = True
) -> list[McoreTensor]:
    """The tensors of a model or of a pipeline stage: its layers, and what the ends hold.

    Tied embeddings are there once, on the first stage.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    found = []
    if first:
        key = "embedding.word_embeddings.weight"
        found.append(McoreTensor(key, (EMBEDDING,), (vocab, hidden), split_dim=0))
    for layer in range(config.num_hidden_layers) if layers is None else layers:
        found += _layer_tensors(config, layer)
    if last:
        found.append(
            McoreTensor("decoder.final_layernorm.weight", ("model.norm.weight",), (hidden,))
        )
        if not config.tie_word_embeddings:
            key = "output_layer.weight"
            found.append(McoreTensor(key, (LM_HEAD,), (vocab, hidden), split_dim=0))
    return found


def _layer_tensors(config: ModelConfig, layer: int) -> list[McoreTensor]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    qkv = queries + 2 * config.num_key_value_heads * config.head_dim
    prefix = f"model.layers.{layer}."

    def tensor(
        key: str,
        parts: Sequence[str],
        shape: tuple[int, ...],
        kind: Kind = "plain",
        split_dim: int | None = None,
    ) -> McoreTensor:
        names = tuple(prefix + part for part in parts)
        return McoreTensor(LAYERS + key, names, shape, layer, kind, split_dim)

    attention = [f"self_attn.{name}_proj" for name in "qkv"]
    mlp = ["mlp.gate_proj", "mlp.up_proj"]
    found = [
        tensor("self_attention.linear_qkv.weight", _weights(attention), (qkv, hidden), "qkv", 0),
        tensor(
            "self_attention.linear_qkv.layer_norm_weight", ["input_layernorm.weight"], (hidden,)
        ),
        tensor(
            "self_attention.linear_proj.weight",
            ["self_attn.o_proj.weight"],
            (hidden, queries),
            split_dim=1,
        ),
        tensor("mlp.linear_fc1.weight", _weights(mlp), (2 * inner, hidden), "gate_up", 0),
        tensor("mlp.linear_fc1.layer_norm_weight", ["post_attention_layernorm.weight"], (hidden,)),
        tensor("mlp.linear_fc2.weight", ["mlp.down_proj.weight"], (hidden, inner), split_dim=1),
    ]
    if config.attention_bias:
        found.append(tensor("self_attention.linear_qkv.bias", _biases(attention), (qkv,), "qkv", 0))
    if config.attention_out_bias:
        found.append(
            tensor("self_attention.linear_proj.bias", ["self_attn.o_proj.bias"], (hidden,))
        )
    if config.mlp_bias:
        found.append(tensor("mlp.linear_fc1.bias", _biases(mlp), (2 * inner,), "gate_up", 0))
        found.append(tensor("mlp.linear_fc2.bias", ["mlp.down_proj.bias"], (hidden,)))
    return found


def _weights(modules: Sequence[str]) -> list[str]:
    return [f"{module}.weight" for module in modules]


def _biases(modules: Sequence[str]) -> list[str]:
    return [f"{module}.bias" for module in modules]


def join(tensor: McoreTensor, parts: Sequence[Tensor], head_dim: int) -> Tensor:
    """The parts, whole or those of one tensor-parallel rank, as the layout has them.

    q [groups * n * head_dim, ...], k and v [groups * head_dim, ...] become the rows of each KV
    group one behind the other; gate and up lie under each other.
    """
    if tensor.kind == "qkv":
        groups = len(parts[1]) // head_dim
        rows = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(rows, dim=1).flatten(0, 1)
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def split(tensor: McoreTensor, joined: Tensor, head_dim: int, groups: int) -> list[Tensor]:
    """The `groups` KV groups' parts that `join` put together, in the order of `tensor.parts`."""
    if tensor.kind == "qkv":
        rows = joined.reshape(groups, -1, *joined.shape[1:])
        sizes = [rows.shape[1] - 2 * head_dim, head_dim, head_dim]
        return [part.flatten(0, 1) for part in rows.split(sizes, dim=1)]
    return list(joined.chunk(len(tensor.parts)))
