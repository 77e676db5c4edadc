"""Tiny GGUF files, written as llama.cpp's converter lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.tiny import CHAT_TEMPLATE

MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = list(bytes_to_unicode().values())
TOKENS = [*SPECIALS, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
CONTROL, NORMAL = 3, 1
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """The row order of q and k in a llama GGUF: rotary pairs side by side."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def write_gguf(
    model: Any,
    path: Path,
    *,
    kind: Kind = Kind.F32,
    arch: str | None = None,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a transformers model; matrices in whole blocks of 32 as `kind`, the rest float32."""
    config = model.config
    arch = arch or {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    for key, value in (metadata or {}).items():
        key = key if key.startswith("tokenizer.") else f"{arch}.{key}"
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    _add_tokenizer(writer)
    for name, tensor in _tensors(model, arch).items():
        quantize = tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and kind != Kind.F32
        data = gguf.quantize(tensor, kind) if quantize else tensor
        writer.add_tensor(name, data, raw_dtype=kind if quantize else None)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([CONTROL] * len(SPECIALS) + [NORMAL] * (len(TOKENS) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def _tensors(model: Any, arch: str) -> dict[str, np.ndarray]:
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        parts = stem.split(".")
        array = tensor.to(torch.float32).numpy()
        if arch == "llama" and parts[-1] in heads:
            array = permuted(array, heads[parts[-1]])
        block = f"blk.{parts[2]}." if "layers" in parts else ""
        tensors[f"{block}{NAMES['.'.join(parts[3:]) if block else stem]}.{suffix}"] = array
    return tensors
