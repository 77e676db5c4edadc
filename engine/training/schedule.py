"""Learning-rate schedules, in Megatron's terms. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Warmup from 0 to `lr`, then decay to `min_lr` until `decay_iters`, which counts the warmup.

    As in Megatron's OptimizerParamScheduler, step k (from 0) of a warmup over n steps has the
    rate lr * k / n; after `decay_iters` steps it is `min_lr`.
    """

    lr: float
    decay_iters: int
    style: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_iters: int = 0
    min_lr: float = 0.0

    def __call__(self, step: int) -> float:
        """The rate of optimizer step `step`, counted from 0."""
        if self.warmup_iters and step <= self.warmup_iters:
            return self.lr * step / self.warmup_iters
        if self.style == "constant":
            return self.lr
        if step > self.decay_iters:
            return self.min_lr
        done = (step - self.warmup_iters) / max(1, self.decay_iters - self.warmup_iters)
        left = 1 - done if self.style == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.min_lr + (self.lr - self.min_lr) * left
