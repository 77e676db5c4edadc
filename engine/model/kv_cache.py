"""Keys and values of several sequences for the layers of one stage, preallocated."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor


class KVCache:
    """KV rows of some sequences: `k` and `v` are [layers, slots, kv_heads, capacity, head_dim].

    Row i of a slot belongs to position i once the sequence's accepted tokens reach it; a draft
    tree is written behind them and compacted by `move` when part of it is accepted. Sequences lie
    side by side so that one product can attend for many of them; what a shorter one has not
    written is masked, and begins as zeros because a mask does not hide NaN.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        slots: int = 1,
        huge_pages: bool = False,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """`huge_pages`: quicker to read; the first row that is written takes the memory of all."""
        shape = (num_layers, slots, num_kv_heads, capacity, head_dim)
        self._pages: list[mmap.mmap] = []
        self.k = self._zeros(shape, dtype, torch.device(device), huge_pages)
        self.v = self._zeros(shape, dtype, torch.device(device), huge_pages)

    @property
    def slots(self) -> int:
        """Sequences that fit."""
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        """Rows of one sequence that fit."""
        return self.k.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.k.nbytes + self.v.nbytes

    def write(
        self, layer: int, slot: int, start: int, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put n new rows of one sequence at `start`; return all its rows up to their end.

        Args:
            layer: index among this stage's layers.
            k, v: [kv_heads, n, head_dim].

        Returns:
            Views of k and v, each [kv_heads, start + n, head_dim].
        """
        end = start + k.shape[1]
        self.k[layer, slot, :, start:end] = k
        self.v[layer, slot, :, start:end] = v
        return self.k[layer, slot, :, :end], self.v[layer, slot, :, :end]

    def write_many(
        self, layer: int, slots: Tensor, places: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put n new rows of each of several sequences at their places.

        Args:
            layer: index among this stage's layers.
            slots: int64 [sequences, 1].
            places: int64 [sequences, n].
            k, v: [sequences, n, kv_heads, head_dim].

        Returns:
            k and v of the layer, each [slots, kv_heads, capacity, head_dim].
        """
        keys, values = self.k[layer], self.v[layer]
        keys[slots, :, places] = k
        values[slots, :, places] = v
        return keys, values

    def move(self, slot: int, rows: Sequence[int], to: int) -> None:
        """Copy `rows` (ascending) of a slot to the places from `to` on: compaction."""
        if not rows:
            return
        index = torch.tensor(rows, device=self.k.device)
        end = to + len(rows)
        for rows_of in (self.k[:, slot], self.v[:, slot]):
            # index_select copies first, so overlapping source and target are safe.
            rows_of[:, :, to:end] = rows_of.index_select(2, index)

    def give_back(self, slot: int) -> None:
        """Let the system have the memory of a slot's rows, where it can; they are zeros then."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        layers, slots = self.k.shape[:2]
        size = self.k[0, slot].nbytes
        for pages in self._pages:
            for layer in range(layers):
                begin = (layer * slots + slot) * size
                first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
                end = (begin + size) // mmap.PAGESIZE * mmap.PAGESIZE
                if end > first:
                    pages.madvise(mmap.MADV_DONTNEED, first, end - first)

    def _zeros(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, huge_pages: bool
    ) -> Tensor:
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # Pages of the system cost nothing until they are written; torch's zeros are written at
        # once, and most of a context is never used. Huge pages fill whole megabytes for one
        # row. Private ones, as only these can be given back.
        pages = mmap.mmap(
            -1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                pages.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
        self._pages.append(pages)
        return torch.frombuffer(pages, dtype=dtype).view(shape)


class KVStore:
    """The caches of all slots of a stage, made when a slot is first used.

    They double in size (1, 1, 2, 4, ... slots), so that a single chat holds the rows of a single
    sequence and a large batch still lies in a few large tensors. The first, a single chat's, has
    huge pages.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._shape = (num_layers, num_kv_heads, capacity, head_dim)
        self._dtype, self._device = dtype, device
        self._caches: dict[int, KVCache] = {}

    def emptied(self, num_layers: int) -> KVStore:
        """One like this, with nothing in it, for another number of layers."""
        _, kv_heads, capacity, head_dim = self._shape
        return KVStore(
            num_layers, kv_heads, capacity, head_dim, dtype=self._dtype, device=self._device
        )

    @property
    def num_layers(self) -> int:
        """Layers that rows are kept of."""
        return self._shape[0]

    @property
    def capacity(self) -> int:
        """Rows of one sequence that fit."""
        return self._shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes that the caches made so far take when they are full."""
        # Read by the telemetry's thread as well, while a cache may be made.
        return sum(cache.nbytes for cache in tuple(self._caches.values()))

    def find(self, slot: int) -> tuple[KVCache, int]:
        """The cache that holds a slot, and the slot's number in it."""
        size = 1 << max(slot.bit_length() - 1, 0)
        first = size if slot else 0
        cache = self._caches.get(first)
        if cache is None:
            cache = self._caches[first] = KVCache(
                *self._shape,
                slots=size,
                huge_pages=first == 0,
                dtype=self._dtype,
                device=self._device,
            )
        return cache, slot - first

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one sequence."""
        layers, heads, _, head_dim = self._shape
        return 2 * layers * heads * head_dim * self._dtype.itemsize

    def copy(self, source: int, slot: int, rows: int) -> None:
        """Have a slot begin with the first `rows` rows of another: a fork.

        A slot that is to begin with none gives its memory back.
        """
        if not rows:
            cache, place = self.find(slot)
            cache.give_back(place)
            return
        (from_, at), (to, place) = self.find(source), self.find(slot)
        to.k[:, place, :, :rows] = from_.k[:, at, :, :rows]
        to.v[:, place, :, :rows] = from_.v[:, at, :, :rows]
