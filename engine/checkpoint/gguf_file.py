"""A GGUF file as a Hugging Face checkpoint: config, names and float weights.

Torch-free: tensors are dequantized to numpy arrays, one at a time. Key and tensor names are those
of the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from gguf.gguf_reader import ReaderTensor

from engine.checkpoint.safetensors_file import Entry, write_sharded
from engine.errors import CheckpointError, shown

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""GGUF's `general.architecture`; Mistral models are "llama" there."""

TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQS = "rope_freqs.weight"
"""Llama 3's frequency factors, precomputed; they become `rope_scaling` and are no weight."""

# These are kept as they are; every other kind is quantized and becomes float32.
FLOAT_DTYPES = {
    GGMLQuantizationType.F32: "F32",
    GGMLQuantizationType.F16: "F16",
    GGMLQuantizationType.BF16: "BF16",
}


class GGUFCheckpoint:
    """One opened GGUF file, its metadata read and checked.

    Raises:
        CheckpointError: the file is damaged, in several parts, or of an architecture or with a
            feature that Jupiter does not support; it is named.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
            raise CheckpointError(f"{path}: not a whole GGUF file: {error}") from None
        self.architecture = str(self.value("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: GGUF architecture {shown(self.architecture)} is not supported; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        if int(self.value("split.count", 1)) > 1:
            raise CheckpointError(f"{path}: one part of several; merge the parts into one file")
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._names = {name: _hf_name(name, path) for name in self._tensors if name != ROPE_FREQS}
        self.config = self._config()

    def value(self, key: str, *default: Any) -> Any:
        """A metadata value; without a default, a missing key is a CheckpointError."""
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise CheckpointError(f"{self.path}: metadata key {key} is missing")

    def write(self, folder: Path, progress: Callable[[int, int], None]) -> None:
        """Write config.json, generation_config.json and the weights to `folder`."""
        entries = [
            self._entry(tensor) for name, tensor in self._tensors.items() if name in self._names
        ]
        write_sharded(folder, entries, written=progress)
        _write_json(folder / "config.json", self.config)
        _write_json(folder / "generation_config.json", self._generation_config())

    def _entry(self, tensor: ReaderTensor) -> Entry:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        dtype = FLOAT_DTYPES.get(tensor.tensor_type, "F32")
        return Entry(self._names[tensor.name], dtype, shape, lambda: self._bytes(tensor, shape))

    def _bytes(self, tensor: ReaderTensor, shape: tuple[int, ...]) -> memoryview:
        if tensor.tensor_type in FLOAT_DTYPES:
            items = np.dtype(
                np.uint32 if tensor.tensor_type == GGMLQuantizationType.F32 else np.uint16
            )
            array = tensor.data.view(items).reshape(shape)
        else:
            array = dequantize(tensor.data, tensor.tensor_type)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        kind = tensor.name.split(".")[-2]
        if self.architecture == "llama" and kind in heads:
            array = unpermute(array, self.config[heads[kind]])
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data

    def _config(self) -> dict[str, Any]:
        """The keys of a Hugging Face config.json."""
        arch = self.architecture
        if int(self.value(f"{arch}.expert_count", 0)):
            raise CheckpointError(f"{self.path}: mixture-of-experts models are not supported")
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path}: tensor token_embd.weight is missing")
        hidden = int(self.value(f"{arch}.embedding_length"))
        heads = int(self.value(f"{arch}.attention.head_count"))
        head_dim = int(self.value(f"{arch}.attention.key_length", hidden // heads))
        rotated = int(self.value(f"{arch}.rope.dimension_count", head_dim))
        if rotated != head_dim:
            raise CheckpointError(
                f"{self.path}: partial rotary embedding ({rotated} of {head_dim}) is not supported"
            )
        context = int(self.value(f"{arch}.context_length"))
        # Within one sliding window attention is full attention, and longer is not supported.
        window = int(self.value(f"{arch}.attention.sliding_window", 0)) or context
        theta = float(self.value(f"{arch}.rope.freq_base", 10000.0))
        config = {
            "architectures": [ARCHITECTURES[arch]],
            "model_type": arch,
            "vocab_size": int(embedding.shape[1]),
            "hidden_size": hidden,
            "intermediate_size": int(self.value(f"{arch}.feed_forward_length")),
            "num_hidden_layers": int(self.value(f"{arch}.block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self.value(f"{arch}.attention.head_count_kv", heads)),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": min(context, window),
            "rms_norm_eps": float(self.value(f"{arch}.attention.layer_norm_rms_epsilon")),
            "rope_theta": theta,
            "rope_scaling": self._rope_scaling(theta, head_dim),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "torch_dtype": "float32",
            **self._special_ids(),
        }
        if arch == "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in self._tensors
            config["mlp_bias"] = "blk.0.ffn_up.bias" in self._tensors
        return config

    def _rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        kind = self.value(f"{self.architecture}.rope.scaling.type", "none")
        if ROPE_FREQS in self._tensors:
            return _llama3_scaling(self._tensors[ROPE_FREQS].data, theta, head_dim, self.path)
        if kind == "linear":
            factor = self.value(f"{self.architecture}.rope.scaling.factor")
            return {"rope_type": "linear", "factor": float(factor)}
        if kind != "none":
            raise CheckpointError(f"{self.path}: rope scaling {shown(kind)} is not supported")
        return None

    def _special_ids(self) -> dict[str, int | None]:
        ids = {"bos": "bos", "eos": "eos", "pad": "padding"}
        return {
            f"{name}_token_id": self.value(f"tokenizer.ggml.{key}_token_id", None)
            for name, key in ids.items()
        }

    def _generation_config(self) -> dict[str, Any]:
        """Special ids; an end-of-turn token of its own stops an answer as well."""
        ids = self._special_ids()
        ends = [ids["eos_token_id"], self.value("tokenizer.ggml.eot_token_id", None)]
        stops = list(dict.fromkeys(token for token in ends if token is not None))
        return {**ids, "eos_token_id": stops[0] if len(stops) == 1 else stops}


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of q and k, [rows] or [rows, columns].

    GGUF interleaves the two halves that rotary embedding pairs up in each head; Hugging Face
    keeps the halves one after the other.
    """
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _hf_name(name: str, path: Path) -> str:
    """The Hugging Face name of a GGUF tensor, such as "blk.3.attn_q.weight"."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block and block[2] in BLOCK_NAMES:
        return f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.{block[3]}"
    stem, _, suffix = name.rpartition(".")
    if stem in TOP_NAMES and suffix == "weight":
        return f"{TOP_NAMES[stem]}.weight"
    raise CheckpointError(f"{path}: tensor {name} belongs to a feature that is not supported")


def _llama3_scaling(
    factors: np.ndarray, theta: float, head_dim: int, path: Path
) -> dict[str, float | int | str]:
    """The llama3 parameters behind precomputed frequency factors, [head_dim / 2].

    GGUF keeps only the result. Every released model has the same three parameters and its own
    `factor`, the largest of the numbers; whether they explain all the numbers is checked.
    """
    low, high, original = 1.0, 4.0, 8192
    factor = float(factors.max())
    expected = []
    for index in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * index / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        expected.append(1.0 / ((1.0 - smooth) / factor + smooth))
    if not np.allclose(factors, expected, rtol=1e-4):
        raise CheckpointError(f"{path}: {ROPE_FREQS} is not Llama 3's rope scaling")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
