"""Hugging Face folders to Megatron-Core checkpoints and back, one tensor in memory at a time."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.dcp import Chunk, whole, write_parts
from engine.checkpoint.head_layouts import TOKEN_MAP, check_heads, inspect_heads
from engine.checkpoint.heads import HeadReader, head_names
from engine.checkpoint.mcore import (
    McoreReader,
    extra_states,
    parallel_args,
    place,
    write_common,
)
from engine.checkpoint.mcore_files import ARGUMENTS, name_of, write_tracker
from engine.checkpoint.mcore_files import ITERATION as ITERATION_NAME
from engine.checkpoint.mcore_names import McoreTensor, join, model_tensors
from engine.checkpoint.merge import HEADS, copy_texts, heads_config, new_folder, write_config
from engine.checkpoint.preflight import is_merged
from engine.checkpoint.reader import WeightReader, open_checkpoint
from engine.checkpoint.safetensors_file import DEFAULT_SHARD_BYTES, write_sharded
from engine.checkpoint.tensor_entry import tensor_entry
from engine.errors import CheckpointError
from engine.model.config import ModelConfig, check_divides

ITERATION = 1
"""Number under which a converted model is kept."""
Progress = Callable[[int, int], None]


def to_mcore(
    folder: Path,
    output: Path,
    *,
    heads: Path | None = None,
    dtype: torch.dtype | None = None,
    tp: int = 1,
    stages: Sequence[range] | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write the model in `folder` to the new folder `output` as a Megatron-Core checkpoint.

    Medusa heads, those merged into the model or those at `heads`, keep their names. The tensors
    are cut as `tp` tensor-parallel ranks hold them, with a file for each rank and stage, or more
    where these would be larger than `shard_bytes`. `output` appears whole or not at all.

    Args:
        dtype: of all weights; None keeps each as it is stored.
        stages: decoder layers of each pipeline stage; None for one stage.

    Raises:
        CheckpointError: a file is damaged, heads do not fit, or `output` is not empty.
        ConfigError: `tp` does not divide a size of the model; both are named.
    """
    config = ModelConfig.from_folder(folder)
    check_divides(config, tp, vocabulary=True)
    found, more = _heads_of(folder, heads, config, dtype)
    with new_folder(output) as unfinished, open_checkpoint(folder) as reader:
        cutter = _Cutter(reader, config, dtype, tp)
        ranks = [
            list(cutter.chunks(tensors, rank))
            for tensors in _stages(config, stages)
            for rank in range(tp)
        ]
        ranks[-tp] += found
        parts = [part for rank in ranks for part in _parts(rank, shard_bytes)]
        iteration = unfinished / name_of(ITERATION)
        iteration.mkdir()
        layers = range(config.num_hidden_layers)
        write_parts(iteration, _counted(parts, progress), extra_states(config, layers))
        kept = dtype or reader.dtype("model.norm.weight")
        args = parallel_args(config, tp=tp, pp=len(stages or [layers]), dtype=kept)
        write_common(iteration, args, ITERATION)
        write_tracker(unfinished, ITERATION)
        copy_texts(folder, unfinished)
        write_config(folder, unfinished, dtype, more)


class _Cutter:
    """Cuts the weights of a model into the chunks of tensor-parallel ranks."""

    def __init__(
        self,
        reader: WeightReader | McoreReader,
        config: ModelConfig,
        dtype: torch.dtype | None,
        tp: int,
    ) -> None:
        self._reader, self._config, self._dtype, self._tp = reader, config, dtype, tp

    def chunks(self, tensors: Iterable[McoreTensor], rank: int) -> Iterator[Chunk]:
        """What a rank holds of `tensors`; nothing is read yet."""
        for tensor in tensors:
            if rank and tensor.split_dim is None:
                continue  # all have it; one writes it
            shape = list(tensor.shape)
            if tensor.split_dim is not None:
                shape[tensor.split_dim] //= self._tp
            stored = (self._reader.dtype(part) for part in tensor.parts)
            dtype = self._dtype or functools.reduce(torch.promote_types, stored)
            empty = torch.empty(shape, dtype=dtype, device="meta")
            for number, chunk in enumerate(place(tensor, empty, self._config, rank, self._tp)):
                yield replace(chunk, load=partial(self._load, tensor, rank, number, chunk))

    def _load(self, tensor: McoreTensor, rank: int, number: int, chunk: Chunk) -> Tensor:
        parts = [self._reader.tensor(part).to(chunk.dtype) for part in tensor.parts]
        for part, expected in zip(parts, _shapes(tensor, self._config), strict=True):
            if tuple(part.shape) != expected:
                raise CheckpointError(
                    f"{self._reader.path}: tensor {tensor.parts[parts.index(part)]} is "
                    f"{list(part.shape)}, but the model needs {list(expected)}"
                )
        if tensor.split_dim is not None:
            parts = [part.chunk(self._tp, tensor.split_dim)[rank] for part in parts]
        joined = join(tensor, parts, self._config.head_dim)
        return place(tensor, joined, self._config, rank, self._tp)[number].load()


def _shapes(tensor: McoreTensor, config: ModelConfig) -> list[tuple[int, ...]]:
    rows = [tensor.shape[0] // len(tensor.parts)] * len(tensor.parts)
    if tensor.kind == "qkv":
        heads = (config.num_attention_heads, *[config.num_key_value_heads] * 2)
        rows = [count * config.head_dim for count in heads]
    return [(count, *tensor.shape[1:]) for count in rows]


def _stages(config: ModelConfig, stages: Sequence[range] | None) -> list[list[McoreTensor]]:
    stages = stages or [range(config.num_hidden_layers)]
    last = len(stages) - 1
    return [
        model_tensors(config, layers, first=at == 0, last=at == last)
        for at, layers in enumerate(stages)
    ]


def _heads_of(
    folder: Path, heads: Path | None, config: ModelConfig, dtype: torch.dtype | None
) -> tuple[list[Chunk], Mapping[str, int]]:
    """The heads' chunks, and what the config says of them."""
    if heads is None and not is_merged(folder):
        return [], {}
    reader = HeadReader(heads or folder)
    check_heads(reader.spec, config, heads or folder)
    chunks = []
    for name in head_names(reader.spec.num_heads, reader.spec):
        empty = torch.empty(reader.shape(name), dtype=dtype or reader.dtype(name), device="meta")
        load = partial(_converted, reader, name, empty.dtype)
        chunks.append(replace(whole(name, empty), load=load))
    if reader.token_map is not None:
        chunks.append(whole(HEADS + TOKEN_MAP, reader.token_map))
    return chunks, heads_config(reader.spec.num_heads, reader.spec.num_layers)


def _converted(reader: HeadReader, name: str, dtype: torch.dtype) -> Tensor:
    return reader.tensor(name).to(dtype)


def _parts(chunks: Sequence[Chunk], limit: int) -> Iterator[list[Chunk]]:
    """The chunks in groups of at most `limit` bytes, where one chunk is not larger by itself."""
    part: list[Chunk] = []
    used = 0
    for chunk in chunks:
        if part and used + chunk.nbytes > limit:
            yield part
            part, used = [], 0
        part.append(chunk)
        used += chunk.nbytes
    yield part


def _counted(parts: Sequence[Sequence[Chunk]], progress: Progress) -> list[list[Chunk]]:
    """The same, with each load told."""
    total = sum(map(len, parts))
    done = 0

    def counted(chunk: Chunk) -> Tensor:
        nonlocal done
        done += 1
        progress(done, total)
        return chunk.load()

    return [[replace(chunk, load=partial(counted, chunk)) for chunk in part] for part in parts]


def to_hf(
    checkpoint: Path,
    model: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write a Megatron-Core checkpoint to the new folder `output` as a Hugging Face model.

    Config, tokenizer and template are those of the model in `model`. `output` appears whole or
    not at all.

    Raises:
        CheckpointError: a file is missing or damaged, a tensor does not fit, or `output` is not
            empty.
    """
    config = ModelConfig.from_folder(model)
    with McoreReader(checkpoint, config) as reader, new_folder(output) as unfinished:
        entries = []
        for name in reader.keys():  # noqa: SIM118 (no mapping)
            stored = reader.dtype(name)
            kind = dtype if dtype is not None and stored.is_floating_point else stored
            entries.append(
                tensor_entry(name, reader.shape(name), kind, partial(reader.tensor, name))
            )
        write_sharded(unfinished, entries, shard_bytes=shard_bytes, written=progress)
        copy_texts(model, unfinished)
        _copy_arguments(checkpoint, unfinished)
        more: Mapping[str, int] = {}
        if any(entry.name.startswith(HEADS) for entry in entries):
            spec = inspect_heads(unfinished)
            more = heads_config(spec.num_heads, spec.num_layers)
        kept = dtype or reader.dtype("model.norm.weight")
        write_config(model, unfinished, kept, more)


def _copy_arguments(checkpoint: Path, output: Path) -> None:
    """The arguments of the run, where there are some: they tell `jupiter infer` how it asked."""
    run = checkpoint.parent if ITERATION_NAME.fullmatch(checkpoint.name) else checkpoint
    if (run / ARGUMENTS).is_file():
        shutil.copyfile(run / ARGUMENTS, output / ARGUMENTS)
