"""The part of the vocabulary that the heads draft from: the tokens the answers use most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.training.batch import Targets
from engine.training.template import Sample


class Vocabulary:
    """Some token ids, in rising order, as the rows of a smaller output layer.

    Args:
        ids: int64 [n], rising.
        size: tokens of the whole vocabulary.
    """

    def __init__(self, ids: Tensor, size: int) -> None:
        self.ids = ids
        self.rows = torch.full((size,), -1, dtype=torch.int64, device=ids.device)
        """Row of each token, -1 for those left out."""
        self.rows[ids] = torch.arange(len(ids), device=ids.device)

    def restrict(self, targets: Targets, losses: range) -> Targets:
        """Targets of these losses as rows; those left out are dropped and counted."""
        rows, tokens, dropped = list(targets.rows), list(targets.tokens), list(targets.dropped)
        teachers = list(targets.teachers)
        for index in losses:
            row = self.rows[tokens[index]]
            kept = row >= 0
            dropped[index] = len(row) - int(kept.sum())
            rows[index], tokens[index] = rows[index][kept], row[kept]
            if len(teachers[index]):
                teachers[index] = teachers[index][kept]
        return replace(targets, rows=rows, tokens=tokens, dropped=dropped, teachers=teachers)


def most_frequent(samples: Sequence[Sample], size: int, keep: int) -> Tensor:
    """The `keep` tokens that count most often in `samples`, rising, int64 [keep].

    Of equally frequent ones the lower id goes first, so that every rank finds the same.
    """
    found = np.zeros(size, dtype=np.int64)
    for sample in samples:
        found += np.bincount(sample.tokens[sample.targets], minlength=size)
    order = np.argsort(-found, kind="stable")
    return torch.from_numpy(np.sort(order[:keep]))
