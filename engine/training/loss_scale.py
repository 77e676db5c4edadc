"""Dynamic loss scaling for float16 (Micikevicius et al. 2018), by Megatron's rules."""

from __future__ import annotations

import math

INITIAL, LOWEST = 2.0**16, 1.0
GROW_AFTER = 1000
"""Steps without an overflow until the scale is doubled."""
PATIENCE = 2
"""Overflows in one such span until it is halved."""


class LossScale:
    """The factor of the loss, which keeps small gradients above the smallest float16.

    Args:
        enabled: without it the factor is 1 for good.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.value = INITIAL if enabled else 1.0
        self.good_steps, self.patience = 0, PATIENCE

    def update(self, grad_norm: float) -> bool:
        """Adapt to a step whose gradients have this norm; returns whether they can be used."""
        if not self.enabled:
            return True
        if math.isfinite(grad_norm):
            self.good_steps += 1
            if self.good_steps == GROW_AFTER:
                self.good_steps, self.patience = 0, PATIENCE
                self.value *= 2
            return True
        self.good_steps = 0
        self.patience -= 1
        if self.patience <= 0:
            self.value = max(LOWEST, self.value / 2)
        return False

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.value, "good_steps": self.good_steps, "patience": self.patience}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from what `state` gave."""
        if self.enabled and state:
            self.value = float(state["scale"])
            self.good_steps, self.patience = int(state["good_steps"]), int(state["patience"])
