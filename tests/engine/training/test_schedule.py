"""Learning rates against Megatron's formulas, worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from engine.training.schedule import Schedule


def test_warmup_rises_from_zero_and_counts_inside_the_decay() -> None:
    schedule = Schedule(1.0, decay_iters=10, style="linear", warmup_iters=4, min_lr=0.1)
    assert [schedule(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    # Half of the six steps of decay are gone at step 7.
    assert schedule(7) == pytest.approx(0.1 + 0.9 / 2)
    assert schedule(10) == pytest.approx(0.1)
    assert schedule(11) == schedule(1000) == 0.1


def test_cosine_falls_slowly_at_both_ends() -> None:
    schedule = Schedule(2.0, decay_iters=100, min_lr=0.5)
    assert schedule(0) == 2.0
    assert schedule(25) == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule(50) == pytest.approx(1.25)
    assert schedule(100) == pytest.approx(0.5)
    assert all(schedule(s) > schedule(t) for s, t in pairwise(range(101)))


def test_constant_stays_after_the_warmup() -> None:
    schedule = Schedule(3.0, decay_iters=10, style="constant", warmup_iters=2, min_lr=1.0)
    assert [schedule(step) for step in (0, 1, 2, 10, 50)] == [0.0, 1.5, 3.0, 3.0, 3.0]
