"""Megatron-Core checkpoints as what they are here: a model by Hugging Face's names.

    FOLDER/latest_checkpointed_iteration.txt      "1"
    FOLDER/config.json, tokenizer.json, ...       of the model, so that the folder can be run
    FOLDER/iter_0000001/.metadata, __0_0.distcp   the tensors (engine/checkpoint/dcp.py)
    FOLDER/iter_0000001/common.pt                 {args: Namespace, iteration, checkpoint_version}
    FOLDER/iter_0000001/metadata.json             names the format, torch_dist

In the older format, `torch`, an iteration folder holds one file (torch_file.py).

Optimizer states have the names of their weights with a prefix, and are cut as these are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.dcp import Chunk, DcpReader
from engine.checkpoint.mcore_files import (
    COMMON,
    FORMAT,
    TORCH_FILE,
    iteration_folder,
    model_folder,
)
from engine.checkpoint.mcore_names import (
    LAYERS,
    WITH_EXTRA_STATE,
    McoreTensor,
    model_tensors,
    split,
)
from engine.checkpoint.torch_file import TorchFile
from engine.errors import CheckpointError
from engine.model.config import ModelConfig

VERSION = 3.0


def place(
    tensor: McoreTensor,
    joined: Tensor,
    config: ModelConfig,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> list[Chunk]:
    """Where a rank's part of `tensor`, as `join` gives it, lies in the whole.

    It is one chunk, but for gate and up of a tensor-parallel rank, which lie apart.
    """
    pieces = [joined]
    if tensor.kind == "gate_up" and tp_size > 1:
        pieces = list(joined.chunk(2))
    return [
        _chunk(tensor, piece, config, tp_rank + number * tp_size)
        for number, piece in enumerate(pieces)
    ]


def _chunk(tensor: McoreTensor, piece: Tensor, config: ModelConfig, number: int) -> Chunk:
    """`piece` as the `number`-th along the dim that ranks share."""
    offsets = [0] * len(tensor.shape)
    if tensor.split_dim is not None:
        offsets[tensor.split_dim] = number * piece.shape[tensor.split_dim]
    shape, value = tensor.shape, piece
    if tensor.layer is not None:
        shape, offsets = (config.num_hidden_layers, *shape), [tensor.layer, *offsets]
        value = piece[None]
    sizes = tuple(value.shape)
    return Chunk(tensor.key, shape, tuple(offsets), sizes, value.dtype, lambda: value)


def extra_states(config: ModelConfig, layers: Iterable[int]) -> dict[str, list[Tensor]]:
    """The empty states that Megatron-Core expects beside the linear modules of each layer."""
    count = config.num_hidden_layers
    return {
        f"{LAYERS}{module}._extra_state/shard_{layer}_{count}": [torch.empty(0, dtype=torch.uint8)]
        for layer in layers
        for module in WITH_EXTRA_STATE
    }


def write_common(folder: Path, args: Mapping[str, Any], iteration: int, **more: Any) -> None:
    """Write `common.pt` and `metadata.json` of the iteration folder; rank 0 does that.

    Args:
        args: plain values; `parallel_args` gives those that ms-swift reads.
        more: further plain values and tensors.

    Raises:
        OSError: it cannot be written.
    """
    common = {"args": argparse.Namespace(**args), "iteration": iteration}
    torch.save({**common, "checkpoint_version": VERSION, **more}, folder / COMMON)
    (folder / FORMAT).write_text(json.dumps(FORMAT_FACTS), encoding="utf-8")


FORMAT_FACTS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def parallel_args(
    config: ModelConfig, *, tp: int = 1, pp: int = 1, cp: int = 1, dtype: torch.dtype
) -> dict[str, Any]:
    """Megatron's arguments that say what the model is and how many ranks wrote it."""
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 1,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": config.num_key_value_heads != config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": config.rope_theta,
        "normalization": "RMSNorm",
        "norm_epsilon": config.rms_norm_eps,
        "swiglu": True,
        "add_qkv_bias": config.attention_bias,
        "add_bias_linear": config.mlp_bias or config.attention_out_bias,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "padded_vocab_size": config.vocab_size,
        "params_dtype": dtype,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
    }


def read_common(folder: Path) -> dict[str, Any]:
    """What `common.pt` of an iteration folder holds; empty where it is more than plain values.

    Megatron's own holds objects of its classes, which are not loaded.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / COMMON
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            common = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except UnpicklingError:
        return {}
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: damaged or cut short: {reason}") from None
    return common if isinstance(common, dict) else {}


class McoreReader:
    """The weights of a checkpoint by Hugging Face's names, as `WeightReader` gives those of files.

    Raises:
        CheckpointError: no whole checkpoint at `path`, or one of another model than its config.
    """

    def __init__(self, path: Path, config: ModelConfig | None = None) -> None:
        self.path = iteration_folder(path)
        self.config = config or ModelConfig.from_folder(model_folder(path))
        is_one_file = (self.path / TORCH_FILE).is_file()
        self.stored = TorchFile(self.path) if is_one_file else DcpReader(self.path)
        self._places = {
            part: (tensor, number)
            for tensor in model_tensors(self.config)
            for number, part in enumerate(tensor.parts)
        }
        self._last: tuple[str, list[Tensor]] | None = None
        self._check_layers()

    def __enter__(self) -> McoreReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._last = None

    def _check_layers(self) -> None:
        key = f"{LAYERS}mlp.linear_fc2.weight"
        layers = self.stored.shapes.get(key, (0,))[0]
        if layers != self.config.num_hidden_layers:
            raise CheckpointError(
                f"{self.path}: holds {layers} layers, "
                f"but the model's config says {self.config.num_hidden_layers}"
            )

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._own()

    def _own(self) -> list[str]:
        """Tensors that are not the base model's: Medusa heads."""
        return [key for key in self.stored.shapes if key.startswith("medusa_head.")]

    def keys(self) -> list[str]:
        """The tensors' names."""
        return [*self._places, *self._own()]

    def file(self, key: str) -> Path:
        """The folder that holds `key`; CheckpointError when there is no such tensor."""
        if key not in self:
            raise CheckpointError(f"{self.path}: tensor {key} is missing")
        return self.path

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of `key`; CheckpointError as for `tensor`."""
        self.file(key)
        if key not in self._places:
            return self.stored.shapes[key]
        tensor, number = self._places[key]
        config, rows = self.config, tensor.shape[0]
        if tensor.kind == "gate_up":
            rows //= 2
        elif tensor.kind == "qkv":
            heads = (config.num_attention_heads, *[config.num_key_value_heads] * 2)
            rows = heads[number] * config.head_dim
        return (rows, *tensor.shape[1:])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {key: self.shape(key) for key in self.keys()}

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of `key` as it is stored; CheckpointError as for `tensor`."""
        self.file(key)
        return self.stored.dtype(self._places[key][0].key if key in self._places else key)

    def tensor(self, key: str) -> Tensor:
        """The tensor `key` as it is stored, on the CPU; raises CheckpointError as `DcpReader`."""
        self.file(key)
        if key not in self._places:
            return self.stored.box(key)
        tensor, number = self._places[key]
        where = f"{tensor.key}/{tensor.layer}"
        if self._last is None or self._last[0] != where:  # q, k and v come from one
            self._last = where, self._parts(tensor)
        return self._last[1][number].contiguous()

    def _parts(self, tensor: McoreTensor) -> list[Tensor]:
        """The parts of `tensor`, in the order of `tensor.parts`."""
        joined = torch.empty(tensor.shape, dtype=self.stored.dtype(tensor.key))
        self.stored.read([self._padded(chunk) for chunk in place(tensor, joined, self.config)])
        return split(tensor, joined, self.config.head_dim, self.config.num_key_value_heads)

    def _padded(self, chunk: Chunk) -> Chunk:
        """Megatron may pad the vocabulary; the rows that are more than the model's are not read."""
        stored = self.stored.shapes.get(chunk.key)
        is_vocabulary = chunk.key.endswith(("word_embeddings.weight", "output_layer.weight"))
        if not is_vocabulary or stored is None or stored[0] <= chunk.shape[0]:
            return chunk
        shape = (stored[0], *chunk.shape[1:])
        return Chunk(chunk.key, shape, chunk.offsets, chunk.sizes, chunk.dtype, chunk.load)
