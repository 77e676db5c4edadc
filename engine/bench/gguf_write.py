"""A checkpoint folder as a GGUF file for llama.cpp: the inverse of engine/checkpoint/gguf_file.py.

`python -m engine.bench.gguf_write FOLDER FILE KIND`. The file has no vocabulary: the bench speaks
in tokens. Key and tensor names are those of the GGUF specification (ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from engine.checkpoint.gguf_file import BLOCK_NAMES, ROPE_FREQS, TOP_NAMES
from engine.checkpoint.mcore import McoreReader
from engine.checkpoint.reader import WeightReader, open_checkpoint
from engine.errors import JupiterError
from engine.model.config import ModelConfig

_TOP = {theirs: ours for ours, theirs in TOP_NAMES.items()}
_BLOCK = {theirs: ours for ours, theirs in BLOCK_NAMES.items()}
FILE_TYPES = {Kind.F16: gguf.LlamaFileType.MOSTLY_F16, Kind.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1}


def write_gguf(folder: Path, file: Path, kind: Kind) -> None:
    """Write the model in `folder` to `file`, its matrices as `kind`, the rest as float32.

    A matrix whose rows are no whole blocks of the kind stays float16, as llama.cpp does.
    Raises CheckpointError as reading the folder does.
    """
    model = ModelConfig.from_folder(folder)
    arch = "qwen2" if model.model_type == "qwen2" else "llama"
    writer = gguf.GGUFWriter(file, arch)
    _add_metadata(writer, model, kind)
    with open_checkpoint(folder) as reader:
        _add_tensors(writer, reader, model, kind, permute=arch == "llama")
    if model.rope_scaling.rope_type == "llama3":
        writer.add_tensor(ROPE_FREQS, _frequency_factors(model))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, model: ModelConfig, kind: Kind) -> None:
    writer.add_name("jupiter-bench")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_vocab_size(model.vocab_size)
    writer.add_block_count(model.num_hidden_layers)
    writer.add_context_length(model.context_limit)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_rope_dimension_count(model.head_dim)
    if model.rope_scaling.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.rope_scaling.factor)
    writer.add_tokenizer_model("none")


def _add_tensors(
    writer: gguf.GGUFWriter,
    reader: WeightReader | McoreReader,
    model: ModelConfig,
    kind: Kind,
    *,
    permute: bool,
) -> None:
    heads = {"attn_q": model.num_attention_heads, "attn_k": model.num_key_value_heads}
    for key in list(reader.keys()):
        name = gguf_name(key)
        if name is None or (name == "output.weight" and model.tie_word_embeddings):
            continue
        array = reader.tensor(key).to(torch.float32).numpy()
        part = name.split(".")[-2]
        if permute and part in heads:
            array = permuted(array, heads[part])
        if array.ndim == 1:
            writer.add_tensor(name, array)
            continue
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        its = kind if array.shape[1] % block == 0 else Kind.F16
        writer.add_tensor(name, gguf.quantize(array, its), raw_dtype=its)


def gguf_name(key: str) -> str | None:
    """The GGUF name of a Hugging Face tensor; None for what is no part of the base model."""
    stem, _, suffix = key.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{suffix}"
    parts = stem.split(".")
    if parts[:2] == ["model", "layers"] and ".".join(parts[3:]) in _BLOCK:
        return f"blk.{parts[2]}.{_BLOCK['.'.join(parts[3:])]}.{suffix}"
    return None


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k: the halves of each head, [rows] or [rows, columns],
    interleaved (see `gguf_file.unpermute`)."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def _frequency_factors(model: ModelConfig) -> np.ndarray:
    """By what llama3's rope scaling divides each frequency, float32 [head_dim / 2]."""
    scaling = model.rope_scaling
    factors = []
    for exponent in np.arange(0, model.head_dim, 2) / model.head_dim:
        wavelength = 2 * math.pi * model.rope_theta**exponent
        span = scaling.high_freq_factor - scaling.low_freq_factor
        ratio = scaling.original_max_position_embeddings / wavelength
        keep = min(max((ratio - scaling.low_freq_factor) / span, 0.0), 1.0)
        factors.append(1 / ((1 - keep) / scaling.factor + keep))
    return np.array(factors, dtype=np.float32)


def main(words: list[str]) -> int:
    """Write one file; returns the exit code."""
    folder, file, kind = words
    try:
        write_gguf(Path(folder), Path(file), Kind[kind])
    except JupiterError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
