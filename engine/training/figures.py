"""The figures of steps and evaluations. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Losses:
    """The losses of some targets, base first where it has one."""

    loss: float
    """Weighted sum of the means."""
    each: tuple[float, ...]
    """Mean of each loss."""
    accuracy: tuple[float, ...]
    """Share of targets whose token was the likeliest; those left out of the loss count as wrong."""
    dropped: int
    """Targets outside the heads' vocabulary."""


@dataclass(frozen=True)
class Step:
    """The figures of one step."""

    iteration: int
    consumed_samples: int
    losses: Losses
    lr: float
    base_lr: float | None
    grad_norm: float
    params_norm: float | None
    tokens: int
    """Of all ranks."""
    seconds: float
    memory: tuple[int, ...]
    """Bytes that each rank holds; see `metrics.memory_bytes`."""
    loss_scale: float | None = None
    """Of float16, where that is computed in."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds
