"""The tuner against a made-up machine and made-up heads: what it picks, and when it changes it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest

from engine.decoding.acceptance import (
    CANDIDATES,
    Acceptance,
    LiveAcceptance,
    count,
    guessed,
)
from engine.decoding.calibrate import MISS
from engine.decoding.drafted import Drafted
from engine.decoding.step_cost import StepCost
from engine.decoding.tree import Tree
from engine.decoding.tuner import DECIDE_EVERY, LEARN_EVERY, TreeTuner

HEADS = 4
CPU_MS = {1: 12.5, 2: 13.5, 4: 15.5, 8: 18.5, 16: 24.0, 32: 32.0, 64: 48.0}
CPU = {rows: ms / 1000 for rows, ms in CPU_MS.items()}
# SmolLM2-135M in int8 with compiled kernels on two cores: without drafting, and what that adds.
INT8_MS = {1: 5.2, 2: 5.6, 4: 6.2, 8: 7.5, 12: 8.3, 16: 9.6, 24: 12.8, 32: 16.3, 64: 31.3}
INT8 = {rows: ms / 1000 for rows, ms in INT8_MS.items()}
INT8_DRAFT = 0.0007
GPU = {rows: 0.012 + rows * 1e-6 for rows in CPU}


class Heads:
    """Heads that have the token at a rank with given chances, at every depth alike."""

    def __init__(self, *chances: float) -> None:
        self.chances = chances
        self.dice = random.Random(1)

    def rank(self) -> int:
        at = self.dice.random()
        for rank, chance in enumerate(self.chances):
            at -= chance
            if at < 0:
                return rank
        return MISS

    def step(self, tree: Tree | None) -> tuple[list[list[int]], list[int]]:
        """Candidates, and the tokens that stand after a step with `tree`; token = rank or 99."""
        paths = set(tree.paths) if tree else set()
        path: tuple[int, ...] = ()
        while True:
            rank = self.rank()
            if rank == MISS or (*path, rank) not in paths:
                return [list(range(CANDIDATES))] * HEADS, [*path, 99 if rank == MISS else rank]
            path = (*path, rank)

    def calibration(self, positions: int = 4000) -> Acceptance:
        return count(([self.rank() for _ in range(HEADS)] for _ in range(positions)), HEADS)


def run(
    tuner: TreeTuner,
    heads: Heads,
    seconds: Callable[[int, int], float],
    steps: int,
    sequences: int = 1,
) -> list[int]:
    """Let the tuner decide `steps` steps; the size in use at each."""
    sizes, asked = [], 0
    for _ in range(steps):
        tree = tuner.step(sequences)
        now = tuner.heads
        enough = asked >= tree.depth
        if asked:
            candidates, tokens = heads.step(tree if enough else None)
            tuner.observe(Drafted(candidates[:asked]), tokens)
        rows = sequences * (tree.size if enough else 1)
        tuner.timed(rows, seconds(rows, now), tree=tree, heads=now)
        asked = now
        sizes.append(tuner.tree.size)
    return sizes


def changes(sizes: list[int]) -> int:
    return sum(before != after for before, after in itertools.pairwise(sizes))


def machine(measured: dict[int, float], draft: float = 0.002) -> Callable[[int, int], float]:
    """Steps as measured, and drafting that costs `draft` with all heads and its part with fewer."""
    curve = StepCost()
    curve.calibrate({rows: s + draft for rows, s in measured.items()}, undrafted=measured[1])
    return lambda rows, heads: curve.seconds(rows, drafting=heads / HEADS)


def rates(tuner: TreeTuner, seconds: Callable[[int, int], float]) -> dict[int, float]:
    """Tokens per second of the best tree of each size, by what the tuner knows of the heads."""
    return {tree.size: tokens / seconds(tree.size, tree.depth) for tree, tokens in tuner.trees()}


def begun(tuner: TreeTuner, measured: dict[int, float], draft: float = 0.002) -> TreeTuner:
    steps = {rows: s + draft for rows, s in measured.items()}
    tuner.begin(steps, measured[1], measured[1] + draft / HEADS)
    return tuner


# --- acceptance -----------------------------------------------------------------------------------


def test_counts_tell_the_share_of_a_rank_where_the_ranks_before_were_right() -> None:
    counted = count([[0, 0], [0, 1], [2, MISS], [MISS, 0]], 2)
    assert counted.seen == (4, 3)
    assert counted.share(0, 0) == 0.5
    assert counted.share(1, 0) == counted.share(1, 1) == pytest.approx(1 / 3)


def test_paths_without_counts_of_their_own_are_products_and_nested_trees() -> None:
    paths = guessed(5).paths
    assert len(paths) == 63
    shares = dict(paths)
    assert shares[(0, 0)] == pytest.approx(0.4 * 0.4 * 0.85)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    for size in range(1, 64):
        known = {(), *(path for path, _ in paths[:size])}
        assert all(path[:-1] in known for path in known)


def test_live_counts_are_learned_from_tokens_that_the_tree_did_not_try() -> None:
    live = LiveAcceptance(guessed(2), weight=8)
    before = live.share(0, 4)
    for _ in range(200):
        live.observe(Drafted([[5, 6, 7, 8, 9], [0]]), [9])
    assert live.share(0, 4) > 0.9 > before
    assert live.paths()[0] == ((4,), pytest.approx(live.share(0, 4), rel=0.05))
    assert live.share(1, 0) == pytest.approx(guessed(2).share(1, 0))  # nothing was told of it


def test_what_was_learned_fades_and_every_beginning_of_the_paths_stays_a_tree() -> None:
    dice = random.Random(3)
    live = LiveAcceptance(Heads(0.5, 0.2, 0.1).calibration(), weight=32)
    for wanted in (0, 1, 2):
        for _ in range(400):
            tokens = [wanted if dice.random() < 0.9 else 99 for _ in range(HEADS)]
            live.observe(Drafted([list(range(CANDIDATES))] * HEADS), tokens)
        paths = live.paths()
        assert paths[0][0] == (wanted,)
        known = {()}
        for path, share in paths:
            assert path[:-1] in known
            assert 0 < share <= 1
            known.add(path)


# --- the choice -----------------------------------------------------------------------------------


def test_the_choice_is_the_size_with_the_most_tokens_per_second() -> None:
    heads = Heads(0.5, 0.15, 0.08, 0.04)
    calibration = heads.calibration()
    expected = rates(TreeTuner(HEADS, calibration), machine(CPU))
    tuner = begun(TreeTuner(HEADS, calibration), CPU)
    assert expected[tuner.tree.size] == max(expected.values())
    assert 2 <= tuner.tree.size <= 16
    news = tuner.news()
    assert news is not None
    promised = news.chosen.tokens_per_step / news.chosen.step_ms
    assert promised == pytest.approx(max(expected.values()) / 1000, rel=0.02)
    assert tuner.news() is None


START = ["measured", "held up where it drafts", "nothing measured"]


@pytest.mark.parametrize("start", START)
@pytest.mark.parametrize("known", [True, False], ids=["calibrated", "guessed"])
@pytest.mark.parametrize("chances", [(0.4, 0.11, 0.055, 0.04), (0.6, 0.15, 0.08, 0.04), (0.05,)])
def test_the_best_tree_for_int8_kernels_is_found_from_wherever_it_begins(
    chances: tuple[float, ...], known: bool, start: str
) -> None:
    heads = Heads(*chances)
    calibration = heads.calibration(8000)
    true = machine(INT8, INT8_DRAFT)
    tuner = TreeTuner(HEADS, calibration if known else None)
    if start != "nothing measured":
        slow = 2.5 if start == "held up where it drafts" else 1.0
        measured = {rows: s if rows == 1 else slow * s for rows, s in INT8.items()}
        begun(tuner, measured, INT8_DRAFT)
        assert slow == 1.0 or tuner.tree.size == 1
    sizes = run(tuner, heads, true, 900)
    expected = rates(TreeTuner(HEADS, calibration), true)
    assert expected[sizes[-1]] > 0.94 * max(expected.values())
    assert (sizes[-1] > 1) == (chances[0] > 0.2)


def test_odd_timings_do_not_keep_it_from_choosing() -> None:
    heads, dice = Heads(0.6, 0.15, 0.08), random.Random(5)
    true = machine(CPU)
    tuner = TreeTuner(HEADS, heads.calibration())
    tuner.begin({1: math.nan, 4: 0.0, 16: math.inf}, math.nan)
    assert tuner.news() is None  # there is no time to tell of

    def odd(rows: int, heads: int) -> float:
        if dice.random() < 0.2:
            return dice.choice([math.nan, math.inf, 0.0, -1.0, 1e-9, 1e9])
        return true(rows, heads)

    sizes = run(tuner, heads, odd, 800)
    expected = rates(tuner, true)
    assert expected[sizes[-1]] > 0.9 * max(expected.values())
    news = tuner.news()
    assert news is not None
    assert all(0 < option.step_ms < 1000 for option in news.options)


def test_where_rows_are_free_the_largest_tree_is_chosen() -> None:
    heads = Heads(0.5, 0.15, 0.08, 0.04)
    tuner = begun(TreeTuner(HEADS, heads.calibration()), GPU, draft=0.0)
    assert tuner.tree.size >= 48


def test_only_the_heads_of_the_tree_are_asked_and_all_of_them_now_and_then() -> None:
    tuner = begun(TreeTuner(HEADS, Heads(0.5, 0.1).calibration()), CPU)
    depth = tuner.tree.depth
    assert 0 < depth < HEADS
    asked = []
    for _ in range(DECIDE_EVERY - 1):
        tuner.step(1)
        asked.append(tuner.heads)
        assert tuner.width == CANDIDATES
    learning = [at for at, heads in enumerate(asked, 2) if heads == HEADS]
    assert learning == [LEARN_EVERY, DECIDE_EVERY]
    assert {heads for heads in asked if heads != HEADS} == {depth}


def test_a_tree_that_asks_few_heads_is_weighed_by_their_cost_alone() -> None:
    calibration = Heads(0.35).calibration()
    steps = {rows: seconds + 0.008 for rows, seconds in CPU.items()}
    for one_head, size in ((0.0005, 2), (0.008, 1)):
        tuner = TreeTuner(HEADS, calibration)
        tuner.begin(steps, CPU[1], CPU[1] + one_head)
        assert tuner.tree.size == size


def test_heads_that_are_never_right_are_not_asked_any_more() -> None:
    tuner = begun(TreeTuner(HEADS), CPU)
    assert tuner.tree.size > 1
    sizes = run(tuner, Heads(), machine(CPU), 300)
    assert set(sizes[150:]) == {1}


def test_drafting_comes_back_when_the_heads_are_right_again() -> None:
    tuner = begun(TreeTuner(HEADS), CPU)
    run(tuner, Heads(), machine(CPU), 400)
    assert tuner.tree.size == 1
    sizes = run(tuner, Heads(0.8, 0.1), machine(CPU), 800)
    assert sizes[-1] >= 4


def test_the_tree_adapts_within_a_conversation_and_then_rests() -> None:
    poor, good = Heads(0.25, 0.05), Heads(0.8, 0.1)
    tuner = begun(TreeTuner(HEADS, poor.calibration()), CPU)
    small = tuner.tree.size
    sizes = run(tuner, good, machine(CPU), 600)
    assert sizes[256] > small
    assert changes(sizes[256:]) <= 4


def test_noise_alone_does_not_move_the_tree() -> None:
    heads, dice, seconds = Heads(0.5, 0.15, 0.08), random.Random(7), machine(CPU)
    tuner = begun(TreeTuner(HEADS, heads.calibration()), CPU)
    first = tuner.tree.size

    def noisy(rows: int, heads: int) -> float:
        return seconds(rows, heads) * (3.0 if dice.random() < 0.02 else dice.uniform(0.9, 1.2))

    sizes = run(tuner, heads, noisy, 1500)
    assert changes(sizes) <= 8
    assert all(first / 2 <= size <= first * 2 for size in sizes)


@pytest.mark.parametrize("share", [0.6, 1.6])
def test_a_wrong_first_measurement_of_plain_decoding_is_corrected(share: float) -> None:
    """What is used is known at once; that the other is cheaper has to be found out."""
    heads, draft = Heads(0.45, 0.1), 0.003
    calibration = heads.calibration()
    true = machine(CPU, draft)

    def seconds(rows: int, heads: int) -> float:
        return true(rows, heads) * (share if rows == 1 and not heads else 1.0)

    tuner = begun(TreeTuner(HEADS, calibration), CPU, draft)
    assert tuner.tree.size > 1
    sizes = run(tuner, heads, seconds, 1200)
    expected = rates(tuner, seconds)
    assert expected[sizes[-1]] > 0.9 * max(expected.values())
    assert (sizes[-1] == 1) == (share < 1)


def test_many_sequences_at_once_get_smaller_trees() -> None:
    heads = Heads(0.6, 0.15, 0.08)
    tuner = begun(TreeTuner(HEADS, heads.calibration()), CPU)
    alone = tuner.step(1).size
    assert tuner.step(16).size < alone
    assert tuner.step(1).size == alone


def test_a_calibration_that_never_saw_a_head_right_means_no_drafting() -> None:
    never = count([[MISS] * HEADS] * 50, HEADS)
    tuner = begun(TreeTuner(HEADS, never), CPU)
    assert set(run(tuner, Heads(), machine(CPU), 200)) == {1}


def test_a_calibration_of_no_steps_is_not_used() -> None:
    assert TreeTuner(HEADS, count([], HEADS)).largest() == TreeTuner(HEADS).largest()


def test_a_calibration_of_fewer_heads_is_not_used() -> None:
    one = count([[0]] * 50, 1)
    assert TreeTuner(3, one).largest().depth > 1
    many = Heads(0.9).calibration()
    assert TreeTuner(2, many).largest().depth == 2
