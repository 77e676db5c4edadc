"""One micro-batch as the stages take it: sequences under one another, no padding, no mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.model.llama import Rows, Segment
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


def make_rows(samples: Sequence[Sample], device: torch.device) -> tuple[Tensor, Rows]:
    """Token ids int64 [rows] of all samples, and how they attend: each sample to itself."""
    lengths = [len(sample.tokens) for sample in samples]
    tokens = np.concatenate([sample.tokens for sample in samples])
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    ends = np.cumsum(lengths).tolist()
    segments = [
        Segment(slice(end - length, end)) for end, length in zip(ends, lengths, strict=True)
    ]
    return torch.from_numpy(tokens).to(device), Rows(positions, segments)


def make_targets(
    samples: Sequence[Sample],
    distances: Sequence[int],
    device: torch.device,
    *,
    taught: bool = False,
) -> Targets:
    """The targets of a micro-batch for losses that look `distances` tokens ahead.

    Row t of a sample is compared with its token t + distance where that token counts; so a loss
    never looks beyond the end of a sample.

    taught: with `teachers`, whose rows are then among the n too.
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

    return Targets(
        tensor(positions),
        list(map(tensor, rows)),
        list(map(tensor, tokens)),
        [0] * len(distances),
        tensor(known),
        list(map(tensor, teachers)),
    )


def needed_rows(counts: np.ndarray, distances: Sequence[int]) -> np.ndarray:
    """Which rows of a sample, bool [n], some loss looks at; `counts` as in Sample.targets."""
    needed = np.zeros(len(counts), dtype=bool)
    for distance in distances:
        if distance < len(counts):
            needed[: len(counts) - distance] |= counts[distance:]
    return needed
