"""Where the elements that a rank updates lie in the tensors of a Megatron-Core checkpoint.

A piece is a run of a parameter's elements, counted flat; a region is a box of one tensor of the
checkpoint. A run is at most three boxes (the end of a row, whole rows, the beginning of a row);
each of these is cut where the layout puts the parameter's rows apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.checkpoint.mcore_names import McoreTensor, model_tensors
from engine.model.config import ModelConfig
from engine.training.tensor_parallel import Shard


@dataclass(frozen=True)
class Region:
    """A box of a checkpoint's tensor."""

    key: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    elements: slice
    """Of the piece."""


@dataclass(frozen=True)
class _Block:
    """Consecutive rows of a parameter that stay together in the checkpoint."""

    rows: range
    key: str
    shape: tuple[int, ...]
    layer: int | None
    at: int
    """Row of the checkpoint's tensor that the first of them becomes."""


class Regions:
    """The layout of one model: Hugging Face's parameters, and others under their own names."""

    def __init__(self, config: ModelConfig) -> None:
        self._blocks: dict[str, list[_Block]] = {}
        for tensor in model_tensors(config):
            for number, part in enumerate(tensor.parts):
                self._blocks[part] = list(_blocks(tensor, number, config))

    def of(
        self, name: str, shape: tuple[int, ...], shard: Shard | None, start: int, count: int
    ) -> Iterator[Region]:
        """The regions of a piece.

        Args:
            name: the parameter; shape: as this rank has it; shard: its part of the whole one.
            start, count: the piece's elements, of this rank's part.
        """
        whole = list(shape)
        if shard is not None:
            whole[shard.dim] = shard.size
        blocks = self._blocks.get(name)
        if blocks is None:
            blocks = [_Block(range(whole[0]), name, tuple(whole), None, 0)]
        for box in _boxes(shape, start, count):
            for block in blocks:
                region = _cut(box, block, shard, len(shape))
                if region is not None:
                    yield region


def _blocks(tensor: McoreTensor, number: int, config: ModelConfig) -> Iterator[_Block]:
    layers = () if tensor.layer is None else (config.num_hidden_layers,)
    shape = (*layers, *tensor.shape)
    if tensor.kind == "qkv":
        dim, groups = config.head_dim, config.num_key_value_heads
        queries = config.num_attention_heads // groups * dim
        size = queries if number == 0 else dim
        first = (0, queries, queries + dim)[number]
        for group in range(groups):
            rows = range(group * size, (group + 1) * size)
            at = group * (queries + 2 * dim) + first
            yield _Block(rows, tensor.key, shape, tensor.layer, at)
        return
    size = tensor.shape[0] // len(tensor.parts)
    yield _Block(range(size), tensor.key, shape, tensor.layer, number * size)


@dataclass(frozen=True)
class _Box:
    """Rows and columns of this rank's parameter; elements of the piece from `at` on."""

    rows: range
    columns: range
    at: int


def _boxes(shape: tuple[int, ...], start: int, count: int) -> Iterator[_Box]:
    width = 1 if len(shape) == 1 else shape[1]
    at, stop = start, start + count
    while at < stop:
        row, column = divmod(at, width)
        if column or stop - at < width:
            length = min(width - column, stop - at)
            yield _Box(range(row, row + 1), range(column, column + length), at - start)
        else:
            rows = (stop - at) // width
            length = rows * width
            yield _Box(range(row, row + rows), range(width), at - start)
        at += length


def _cut(box: _Box, block: _Block, shard: Shard | None, dims: int) -> Region | None:
    moved = shard.start if shard is not None and shard.dim == 0 else 0
    first = max(box.rows.start + moved, block.rows.start)
    stop = min(box.rows.stop + moved, block.rows.stop)
    if first >= stop:
        return None
    row, width = first - block.rows.start + block.at, len(box.columns)
    column = box.columns.start + (shard.start if shard is not None and shard.dim == 1 else 0)
    offsets, sizes = (row, column)[:dims], (stop - first, width)[:dims]
    if block.layer is not None:
        offsets, sizes = (block.layer, *offsets), (1, *sizes)
    begin = box.at + (first - moved - box.rows.start) * width
    elements = slice(begin, begin + (stop - first) * width)
    return Region(block.key, block.shape, offsets, sizes, elements)
