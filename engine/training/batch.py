"""One micro-batch as the stages take it: sequences under one another, no padding, no mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.model.llama import Rows, Segment
from engine.training.context import own_rows, share_rows
from engine.training.mesh import Group
from engine.training.template import Sample


@dataclass(frozen=True)
class Targets:
    """What each of several losses compares, over the rows that any of them needs."""

    positions: Tensor
    """int64 [n]: these rows, by their numbers in the micro-batch."""
    rows: list[Tensor]
    """Per loss, int64 [m]: which of the n rows it looks at."""
    tokens: list[Tensor]
    """Per loss, int64 [m]: the token that each of them should predict."""
    dropped: list[int]
    """Per loss, targets left out because the heads' vocabulary lacks them."""
    known: Tensor
    """int64 [n, losses]: the tokens that follow each of the n rows, 0 behind a sample's end."""

    teachers: list[Tensor]
    """Per loss, int64 [m]: which of the n rows is the base's own guess of the same token; empty
    where the row before the token is none of the n."""

    def counts(self) -> list[int]:
        """Targets per loss."""
        return [len(tokens) for tokens in self.tokens]


@dataclass(frozen=True)
class Sharing:
    """How the ranks of a replica share the rows of a micro-batch."""

    context: Group
    """The ranks that have some of the rows each."""
    sequence: int = 1
    """Ranks that share their rows once more between the products of a layer."""

    def padded(self, rows: int) -> int:
        """`rows` and as many more as it takes for all shares to be of one size."""
        pieces = (1 if self.context.size == 1 else 2 * self.context.size) * self.sequence
        return -(-rows // pieces) * pieces


@dataclass(frozen=True)
class Batch:
    """One micro-batch as a rank takes it."""

    tokens: Tensor
    """int64 [n]: this rank's rows."""
    rows: Rows
    hidden_rows: int
    """Rows of the hidden states that go from stage to stage."""


def make_batch(
    samples: Sequence[Sample], device: torch.device, sharing: Sharing | None = None
) -> Batch:
    """The rows of all samples, each of which attends to itself; of several ranks, this one's."""
    lengths = [len(sample.tokens) for sample in samples]
    tokens = np.concatenate([sample.tokens for sample in samples])
    if sharing is not None and (extra := sharing.padded(len(tokens)) - len(tokens)):
        lengths.append(extra)  # a sequence that no loss looks at
        tokens = np.concatenate([tokens, np.zeros(extra, dtype=tokens.dtype)])
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    ids = torch.from_numpy(tokens).to(device)
    if sharing is not None and sharing.context.size > 1:
        rows: Rows = share_rows(positions, lengths, sharing.context)
        ids = torch.cat(
            [ids[part.start : part.stop] for part in own_rows(len(ids), sharing.context)]
        )
    else:
        ends = np.cumsum(lengths).tolist()
        segments = [
            Segment(slice(end - length, end)) for end, length in zip(ends, lengths, strict=True)
        ]
        rows = Rows(positions, segments)
    return Batch(ids, rows, len(ids) // (1 if sharing is None else sharing.sequence))


def make_targets(
    samples: Sequence[Sample],
    distances: Sequence[int],
    device: torch.device,
    sharing: Sharing | None = None,
    *,
    taught: bool = False,
) -> Targets:
    """The targets of a micro-batch for losses that look `distances` tokens ahead.

    Row t of a sample is compared with its token t + distance where that token counts; so a loss
    never looks beyond the end of a sample. Where ranks share the rows, each has the targets of its
    own.

    taught: with `teachers`, whose rows are then among the n too; for one rank alone.
    """
    positions, known, at, base = [], [], 0, 0
    rows: list[list[np.ndarray]] = [[] for _ in distances]
    tokens: list[list[np.ndarray]] = [[] for _ in distances]
    teachers: list[list[np.ndarray]] = [[] for _ in distances]
    for sample in samples:
        ids = sample.tokens
        counts = sample.targets
        needed = needed_rows(counts, (1, *distances) if taught else distances)
        place = np.cumsum(needed) - 1  # of a needed row among the needed ones
        for index, distance in enumerate(distances):
            looking = np.flatnonzero(counts[distance:])
            rows[index].append(place[looking] + base)
            tokens[index].append(ids[looking + distance])
            behind = looking + distance - 1 if taught else looking[:0]
            teachers[index].append(place[behind] + base)
        found = np.flatnonzero(needed)
        positions.append(found + at)
        padded = np.pad(ids, (0, len(distances)))
        known.append(padded[found[:, None] + 1 + np.arange(len(distances))])
        at, base = at + len(ids), base + len(found)

    def tensor(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device)

    targets = Targets(
        tensor(positions),
        list(map(tensor, rows)),
        list(map(tensor, tokens)),
        [0] * len(distances),
        tensor(known),
        list(map(tensor, teachers)),
    )
    if sharing is None or sharing.context.size == 1:
        return targets
    return _own(targets, own_rows(sharing.padded(at), sharing.context))


def _own(targets: Targets, parts: Sequence[range]) -> Targets:
    """The targets of the rows in `parts`, which a rank has under one another."""
    device = targets.positions.device
    mine = torch.cat([torch.arange(part.start, part.stop) for part in parts]).to(device)
    size = max(int(mine.max()), int(targets.positions.max()) if len(targets.positions) else 0) + 1
    place = targets.positions.new_full((size,), -1)
    place[mine] = torch.arange(len(mine), device=device)
    here = place[targets.positions]
    kept = here >= 0
    number = torch.cumsum(kept, 0) - 1  # of a kept row among the kept ones
    rows, tokens = [], []
    for row, token in zip(targets.rows, targets.tokens, strict=True):
        rows.append(number[row][kept[row]])
        tokens.append(token[kept[row]])
    known, none = targets.known[kept], [row[:0] for row in rows]
    return Targets(here[kept], rows, tokens, targets.dropped, known, none)


def needed_rows(counts: np.ndarray, distances: Sequence[int]) -> np.ndarray:
    """Which rows of a sample, bool [n], some loss looks at; `counts` as in Sample.targets."""
    needed = np.zeros(len(counts), dtype=bool)
    for distance in distances:
        if distance < len(counts):
            needed[: len(counts) - distance] |= counts[distance:]
    return needed
