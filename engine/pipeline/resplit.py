"""Another split at the same number of stages: only layers that change hands move, with their rows.

Weights and KV rows go straight from the stage that had a layer to the one that gets it, as they lie
in memory: nothing is read again, packed again or computed again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.kernels.forward import NativeForward
from engine.kernels.native import PackedLayer, PackedLinear
from engine.model.kv_cache import KVStore
from engine.model.llama import LayerRange, LlamaDecoderLayer
from engine.pipeline.stage import Stage

TAG = 1
"""Of these messages; those of `Link` have none, and a thread of rank 0 waits for them."""

Split = Sequence[int]


@dataclass(frozen=True)
class Move:
    """A layer, by its number in the whole model, that goes from one rank to another."""

    layer: int
    source: int
    target: int


def moves(old: Split, new: Split) -> list[Move]:
    """What changes hands between two splits of the same layers, in the order of the layers."""
    before, after = _owners(old), _owners(new)
    return [
        Move(layer, source, target)
        for layer, (source, target) in enumerate(zip(before, after, strict=True))
        if source != target
    ]


def _owners(split: Split) -> list[int]:
    return [rank for rank, count in enumerate(split) for _ in range(count)]


def layers_of(split: Split, rank: int) -> range:
    """The layers of a rank, by their numbers in the whole model."""
    ends = list(accumulate(split))
    return range(ends[rank] - split[rank], ends[rank])


@torch.inference_mode()
def change_split(
    stage: Stage, rank: int, old: Split, new: Split, slots: Sequence[tuple[int, int]]
) -> None:
    """Give away and take over what makes `new` of `old`; every rank has to call it.

    Args:
        stage: of `rank`.
        old, new: layers per stage.
        slots: the KV slots in use, and how many rows of each.

    Raises RuntimeError when a neighbour is gone.
    """
    before, after = layers_of(old, rank), layers_of(new, rank)
    parts = dict(zip(before, _parts(stage), strict=True))
    template = next(iter(parts.values()))
    store = stage.store.emptied(len(after))
    caches = [(slot, rows, *stage.store.find(slot)) for slot, rows in slots]
    works: list[tuple[dist.Work | None, Tensor]] = []
    for move in moves(old, new):
        if move.source == rank:
            payload = _pack(parts[move.layer], _rows(caches, move.layer - before.start))
            works.append((dist.isend(payload, move.target, tag=TAG), payload))
    kept = dict(parts)
    for move in moves(old, new):
        if move.target == rank:
            kept[move.layer] = _receive(stage, template, move, store, slots, after.start)
    for layer in set(before) & set(after):
        for slot, rows, cache, at in caches:
            target, place = store.find(slot)
            for new_rows, old_rows in ((target.k, cache.k), (target.v, cache.v)):
                new_rows[layer - after.start, place, :, :rows] = old_rows[
                    layer - before.start, at, :, :rows
                ]
    for work, _ in works:
        if work is not None:
            work.wait()
    _install(stage, after, [kept[layer] for layer in after])
    stage.store = store


# --- a layer -------------------------------------------------------------------------------------


@dataclass
class _Part:
    """A layer as the stage holds it; with kernels, the module has little more than the norms."""

    module: LlamaDecoderLayer
    packed: PackedLayer | None

    def tensors(self) -> Iterator[Tensor]:
        yield from self.module.state_dict().values()
        if self.packed is not None:
            yield from _tensors(self.packed)


def _tensors(packed: PackedLayer) -> Iterator[Tensor]:
    for field in fields(packed):
        value = getattr(packed, field.name)
        if isinstance(value, PackedLinear):
            yield from (t for t in (value.weight, value.scale, value.bias) if t is not None)


def _parts(stage: Stage) -> list[_Part]:
    modules: list[Any] = list(stage.model.model.layers)
    packed: Sequence[PackedLayer | None] = [None] * len(modules)
    if isinstance(stage.forward, NativeForward):
        packed = stage.forward.packed_layers
    return [_Part(module, each) for module, each in zip(modules, packed, strict=True)]


@torch.inference_mode(False)
def _blank(stage: Stage, like: _Part) -> _Part:
    """A layer of the same shape whose values are to come."""
    rotary = stage.model.model.rotary_emb
    # What the layers share, and what counts them, is not copied.
    shared = {id(rotary): rotary, id(stage.forward): stage.forward}
    module = copy.deepcopy(like.module, shared)
    packed = like.packed
    if packed is None:
        return _Part(module, None)
    norms = (module.input_layernorm.weight, module.post_attention_layernorm.weight)
    products = (packed.qkv, packed.o, packed.gate_up, packed.down)
    return _Part(module, PackedLayer(*norms, *map(_blank_product, products)))


def _blank_product(like: PackedLinear) -> PackedLinear:
    bias = None if like.bias is None else torch.empty_like(like.bias)
    weight, scale = torch.empty_like(like.weight), torch.empty_like(like.scale)
    return PackedLinear(weight, scale, bias, like.n_in, like.n_out, like.block)


def _install(stage: Stage, numbers: range, parts: Sequence[_Part]) -> None:
    stage.model.model.layers = LayerRange(numbers, [part.module for part in parts])
    if isinstance(stage.forward, NativeForward):
        stage.forward.use_layers([part.packed for part in parts if part.packed is not None])


# --- on the way ----------------------------------------------------------------------------------


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _rows(caches: Sequence[tuple], layer: int) -> Iterator[Tensor]:
    for _, rows, cache, at in caches:
        yield cache.k[layer, at, :, :rows]
        yield cache.v[layer, at, :, :rows]


def _pack(part: _Part, rows: Iterator[Tensor]) -> Tensor:
    """The bytes of a layer and its rows, in host memory."""
    return torch.cat([_bytes(tensor).cpu() for tensor in (*part.tensors(), *rows)])


def _receive(
    stage: Stage,
    template: _Part,
    move: Move,
    store: KVStore,
    slots: Sequence[tuple[int, int]],
    first: int,
) -> _Part:
    """A layer that another rank gives away; its rows go into `store`."""
    part = _blank(stage, template)
    caches = [(slot, rows, *store.find(slot)) for slot, rows in slots]
    targets = [*part.tensors(), *_rows(caches, move.layer - first)]
    sizes = [target.numel() * target.element_size() for target in targets]
    payload = torch.empty(sum(sizes), dtype=torch.uint8)
    dist.recv(payload, move.source, tag=TAG)
    for target, data in zip(targets, payload.split(sizes), strict=True):
        # Cloned, as a view of another type has to begin where one of its values may.
        target.copy_(data.clone().view(target.dtype).view(target.shape))
    return part


def encode_split(split: Split, slots: Sequence[tuple[int, int]]) -> list[int]:
    """The numbers of a RESPLIT message: layers per stage, and the KV slots in use with rows."""
    return [len(split), *split, *(number for slot in slots for number in slot)]


def decode_split(numbers: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """The inverse of `encode_split`."""
    count = numbers[0]
    rest = numbers[1 + count :]
    return list(numbers[1 : 1 + count]), list(zip(rest[::2], rest[1::2], strict=True))
