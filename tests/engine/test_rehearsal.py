"""How long a rehearsal takes, on stages whose steps take as long as the test says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.decoding.tuner import SIZES, TreeTuner
from engine.model.medusa import HeadShape
from engine.pipeline.batch import Entry, decode_batch
from engine.pipeline.link import Kind, Link
from engine.pipeline.rehearsal import BUDGET_S, ROUNDS, rehearse
from engine.pipeline.stage import Stage

HEADS = 5


class Stages:
    """A stage, or with a link the first of two: steps take `cost(nodes, heads)` seconds."""

    def __init__(self, cost: Callable[[int, int], float]) -> None:
        self.cost = cost
        self.model = SimpleNamespace(heads=HeadShape(HEADS))
        self.now = 100.0
        self.steps: list[tuple[int, int]] = []
        self.sent: list[list[Entry]] = []

    def run(self, entries: Sequence[Entry], hidden: None) -> None:
        (entry,) = entries
        assert entry.start + len(entry.tokens) <= 512
        nodes, heads = len(entry.tokens), entry.draft_heads or HEADS if entry.draft_width else 0
        self.steps.append((nodes, heads))
        self.now += self.cost(nodes, heads)

    def judge(self, entries: Sequence[Entry], hidden: None) -> None:
        """Its time is in that of `run`."""

    def send(self, to: int, kind: Kind, numbers: list[int], hidden: None) -> None:
        assert (to, kind) == (1, Kind.BATCH)
        self.sent.append(decode_batch(numbers))

    def receive(self, source: int) -> None:
        assert source == 2 and self.sent.pop()

    def rehearse(
        self, *, linked: bool = False, largest: int = 64
    ) -> tuple[dict[int, float], float, float]:
        stage, link = cast(Stage, self), cast(Link, self) if linked else None
        settings: dict[str, Any] = {"context_length": 448, "largest": largest}
        return rehearse(stage, link, 2, **settings, clock=lambda: self.now)


def int8(nodes: int, heads: int) -> float:
    return 0.005 + 0.0004 * nodes + 0.0002 * heads


@pytest.mark.parametrize("linked", [False, True])
def test_all_sizes_are_measured_where_there_is_time(linked: bool) -> None:
    stages = Stages(int8)
    found, undrafted, one_head = stages.rehearse(linked=linked)
    assert found == {nodes: pytest.approx(int8(nodes, HEADS)) for nodes in SIZES}
    assert (undrafted, one_head) == (pytest.approx(int8(1, 0)), pytest.approx(int8(1, 1)))
    assert stages.now - 100 < BUDGET_S + int8(64, HEADS)
    assert not stages.sent


def test_what_is_fast_is_measured_so_often_and_no_more() -> None:
    stages = Stages(lambda nodes, heads: 1e-4)
    found, _, _ = stages.rehearse(largest=21)
    assert set(found) == {size for size in SIZES if size < 21} | {21}
    assert all(stages.steps.count((nodes, HEADS)) == ROUNDS for nodes in found if nodes != 16)


def test_slow_stages_are_only_asked_for_what_allows_to_compare() -> None:
    stages = Stages(lambda nodes, heads: 2.0 + nodes / 8)
    found, *others = stages.rehearse()
    assert set(found) == {1, 16}
    assert len(stages.steps) <= 5
    tuner = TreeTuner(HEADS)
    tuner.begin(found, *others)
    assert tuner.cost.seconds(64, drafting=1.0) == pytest.approx(10.0)


def test_a_step_that_was_held_up_is_measured_again() -> None:
    stages = Stages(lambda nodes, heads: 0.1 if len(stages.steps) == 3 else int8(nodes, heads))
    found, _, _ = stages.rehearse()
    assert found[1] == pytest.approx(int8(1, HEADS))


@pytest.mark.parametrize("seconds", [0.0, math.nan])
def test_a_clock_that_tells_nothing_ends_it_and_leaves_a_tree_to_begin_with(seconds: float) -> None:
    stages = Stages(lambda nodes, heads: seconds)
    tuner = TreeTuner(HEADS)
    tuner.begin(*stages.rehearse())
    assert len(stages.steps) <= 2 + ROUNDS * (len(SIZES) + 2)
    assert tuner.news() is None
    assert tuner.tree.size in SIZES
