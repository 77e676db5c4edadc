"""Keys and values of one sequence for the layers of one stage, preallocated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """KV rows of one sequence: `k` and `v` are [layers, kv_heads, capacity, head_dim].

    Row i belongs to position i once the sequence's accepted tokens reach it; a draft tree is
    written behind them and compacted by `move` when part of it is accepted. Nothing is zeroed:
    a reader never looks past the rows it has written.
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
        shape = (num_layers, num_kv_heads, capacity, head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.k.nbytes + self.v.nbytes

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put n new rows at `start`; return all rows up to their end.

        Args:
            layer: index among this stage's layers.
            k, v: [kv_heads, n, head_dim].

        Returns:
            Views of k and v, each [kv_heads, start + n, head_dim].
        """
        end = start + k.shape[1]
        self.k[layer, :, start:end] = k
        self.v[layer, :, start:end] = v
        return self.k[layer, :, :end], self.v[layer, :, :end]

    def move(self, rows: Sequence[int], to: int) -> None:
        """Copy `rows` (ascending) to the places from `to` on: compaction after acceptance."""
        if not rows:
            return
        index = torch.tensor(rows, device=self.k.device)
        end = to + len(rows)
        # index_select copies first, so overlapping source and target are safe.
        self.k[:, :, to:end] = self.k.index_select(2, index)
        self.v[:, :, to:end] = self.v.index_select(2, index)
