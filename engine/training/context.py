"""Context parallel attention: each rank has some of the rows, and all keys and values.

The rows of a micro-batch are dealt out in 2 × cp pieces of one length; rank r takes the r-th piece
from the front and the r-th from the back, so that causal attention costs each rank about the same
(Dubey et al. 2024, 3.3.2). Keys and values of all rows are gathered in each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.model.llama import LlamaAttention, Rows
from engine.training.mesh import Group
from engine.training.row_exchange import gather_rows


@dataclass(frozen=True)
class Stretch:
    """Consecutive rows of one sequence that this rank has."""

    rows: slice
    """Among this rank's rows."""
    seen: slice
    """Rows of the whole micro-batch that they may see: their sequence up to their last."""
    mask: Tensor | None
    """bool [n, seen]: the causal mask, or None where the rows are all of `seen`."""


@dataclass
class SharedRows(Rows):
    """How this rank's rows attend, of a micro-batch that several ranks share."""

    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 [all rows]: where each row of the micro-batch is among the ranks' rows."""
    stretches: list[Stretch] = field(default_factory=list)


def own_rows(total: int, group: Group) -> list[range]:
    """The rows of this rank out of `total`, a multiple of 2 × the ranks."""
    return _rows_of(total, group.index, group.size)


def _rows_of(total: int, index: int, size: int) -> list[range]:
    if size == 1:
        return [range(total)]
    step = total // (2 * size)
    back = 2 * size - 1 - index
    return [range(index * step, (index + 1) * step), range(back * step, (back + 1) * step)]


def share_rows(positions: Tensor, lengths: Sequence[int], group: Group) -> SharedRows:
    """This rank's part of rows that attend to their own sequence.

    Args:
        positions: int64 [rows], in their sequences; lengths: rows of each sequence.
    """
    total = len(positions)
    everyone = [row for rank in range(group.size) for part in _rows_of(total, rank, group.size)
                for row in part]  # fmt: skip
    order = torch.empty(total, dtype=torch.int64)
    order[torch.tensor(everyone)] = torch.arange(total)
    stretches, at = [], 0
    for part in own_rows(total, group):
        start = 0
        for length in lengths:
            first, stop = max(part.start, start), min(part.stop, start + length)
            if first < stop:
                place = at + first - part.start
                rows = slice(place, place + stop - first)
                stretches.append(_stretch(rows, start, first, stop, positions.device))
            start += length
        at += len(part)
    mine = torch.cat([positions[part.start : part.stop] for part in own_rows(total, group)])
    return SharedRows(mine, [], order=order.to(positions.device), stretches=stretches)


def _stretch(rows: slice, start: int, first: int, stop: int, device: torch.device) -> Stretch:
    mask = None
    if first > start:
        size = (stop - first, stop - start)
        mask = torch.ones(size, dtype=torch.bool, device=device).tril(first - start)
    return Stretch(rows, slice(start, stop), mask)


def share_attention(attention: LlamaAttention, group: Group) -> None:
    """Have an attention look at the rows of all ranks, in place."""

    def attend(q: Tensor, k: Tensor, v: Tensor, rows: Rows, layer: int) -> Tensor:
        assert isinstance(rows, SharedRows)
        both = gather_rows(torch.cat((k, v), dim=1), group)[rows.order]
        keys, values = both.split(k.shape[1], dim=1)
        parts = []
        for stretch in rows.stretches:
            out = F.scaled_dot_product_attention(
                _heads_first(q[stretch.rows]),
                _heads_first(keys[stretch.seen]),
                _heads_first(values[stretch.seen]),
                attn_mask=stretch.mask,
                is_causal=stretch.mask is None,
                enable_gqa=True,
            )
            parts.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(parts)

    attention.attend_rows = attend  # type: ignore[method-assign]


def _heads_first(x: Tensor) -> Tensor:
    """[n, heads, head_dim] -> [1, heads, n, head_dim]."""
    return x.transpose(0, 1).unsqueeze(0)
