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
from engine.decoding.step_cost import StepCost
from engine.decoding.tree import Tree
from engine.decoding.tuner import SIZES, TreeTuner

HEADS = 4
CPU_MS = {1: 12.5, 2: 13.5, 4: 15.5, 8: 18.5, 16: 24.0, 32: 32.0, 64: 48.0}
CPU = {rows: ms / 1000 for rows, ms in CPU_MS.items()}
# SmolLM2-135M in int8 with compiled kernels on two cores, drafting and judging included.
INT8_MS = {1: 5.9, 2: 6.3, 4: 6.9, 8: 8.2, 12: 9.0, 16: 10.3, 24: 13.5, 32: 17.0, 64: 32.0}
INT8 = {rows: ms / 1000 for rows, ms in INT8_MS.items()}
INT8_UNDRAFTED = 0.0052
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
    seconds: Callable[[int, bool], float],
    steps: int,
    sequences: int = 1,
) -> list[int]:
    """Let the tuner decide `steps` steps; the size in use at each."""
    sizes, drafted_before = [], False
    for _ in range(steps):
        tree = tuner.step(sequences)
        drafted = tuner.width > 0
        if drafted_before:
            tuner.observe(*heads.step(tree))
        rows = sequences * (tree.size if drafted_before else 1)
        tuner.timed(rows, seconds(rows, drafted), tree=tree, drafted=drafted)
        drafted_before = drafted
        sizes.append(tuner.tree.size)
    return sizes


def changes(sizes: list[int]) -> int:
    return sum(before != after for before, after in itertools.pairwise(sizes))


def cost(measured: dict[int, float], draft: float = 0.002) -> StepCost:
    found = StepCost()
    whole = {rows: s + draft for rows, s in measured.items()}
    found.calibrate(whole, undrafted=measured[1])
    return found


def machine(measured: dict[int, float], draft: float = 0.002) -> Callable[[int, bool], float]:
    curve = cost(measured, draft)
    return lambda rows, drafted: curve.seconds(rows, drafted=drafted)


def begun(tuner: TreeTuner, measured: dict[int, float], draft: float = 0.002) -> TreeTuner:
    tuner.begin({rows: s + draft for rows, s in measured.items()}, measured[1])
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
        live.observe([[5, 6, 7, 8, 9], [0]], [9])
    assert live.share(0, 4) > 0.9 > before
    assert live.paths()[0] == ((4,), pytest.approx(live.share(0, 4), rel=0.05))
    assert live.share(1, 0) == pytest.approx(guessed(2).share(1, 0))  # nothing was told of it


def test_what_was_learned_fades_and_every_beginning_of_the_paths_stays_a_tree() -> None:
    dice = random.Random(3)
    live = LiveAcceptance(Heads(0.5, 0.2, 0.1).calibration(), weight=32)
    for wanted in (0, 1, 2):
        for _ in range(400):
            tokens = [wanted if dice.random() < 0.9 else 99 for _ in range(HEADS)]
            live.observe([list(range(CANDIDATES))] * HEADS, tokens)
        paths = live.paths()
        assert paths[0][0] == (wanted,)
        known = {()}
        for path, share in paths:
            assert path[:-1] in known
            assert 0 < share <= 1
            known.add(path)


# --- costs ----------------------------------------------------------------------------------------


def test_costs_lie_between_those_measured_and_go_on_behind_them() -> None:
    found = cost({1: 0.010, 16: 0.025, 64: 0.049})
    assert found.seconds(16, drafted=False) == pytest.approx(0.025)
    assert found.seconds(16, drafted=True) == pytest.approx(0.027)
    assert found.seconds(6, drafted=False) == pytest.approx(0.015)
    assert found.seconds(40, drafted=False) == pytest.approx(0.037)
    assert found.seconds(128, drafted=False) == pytest.approx(0.081)
    assert found.seconds(2048, drafted=False) > found.seconds(1024, drafted=False)


def test_a_slower_machine_changes_the_pace_and_not_how_sizes_compare() -> None:
    found = cost(CPU)
    ratio = found.seconds(16, drafted=True) / found.seconds(1, drafted=False)
    for _ in range(60):
        found.learn(8, 0.060, drafted=True)
    assert found.seconds(8, drafted=True) == pytest.approx(0.060, rel=0.02)
    after = found.seconds(16, drafted=True) / found.seconds(1, drafted=False)
    assert after == pytest.approx(ratio)


def test_a_step_of_another_size_corrects_its_cost_alone() -> None:
    found = cost(CPU)
    for _ in range(30):
        found.compare(16, 0.040, drafted=True, in_use=8)
    assert found.seconds(16, drafted=True) == pytest.approx(0.040, rel=0.02)
    assert found.seconds(8, drafted=True) == pytest.approx(0.0205)
    before = found.seconds(16, drafted=True)
    found.compare(16, 5.0, drafted=True, in_use=8)  # a step that was held up
    assert found.seconds(16, drafted=True) < 1.3 * before


def test_a_size_that_was_held_up_costs_no_more_than_the_next_larger() -> None:
    found = StepCost()
    found.calibrate({1: 0.060, 4: 0.012, 8: 0.190, 16: 0.024, 64: 0.072}, undrafted=0.010)
    expected = {1: 0.012, 4: 0.012, 8: 0.024, 16: 0.024, 64: 0.072}
    for rows, seconds in expected.items():
        assert found.seconds(rows, drafted=True) == pytest.approx(seconds)
    assert found.seconds(1, drafted=False) == pytest.approx(0.010)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -1.0, 0.0])
def test_what_is_no_duration_is_passed_over(odd: float) -> None:
    found = StepCost()
    found.calibrate({1: 0.012, 4: odd, 16: 0.024}, undrafted=odd)
    assert found.seconds(4, drafted=True) == pytest.approx(0.0144)
    found.learn(4, odd, drafted=True)
    found.compare(16, odd, drafted=True, in_use=4)
    assert found.seconds(16, drafted=True) == pytest.approx(0.024)


def test_a_clock_that_hardly_moves_makes_nothing_free() -> None:
    found = cost(CPU)
    before = found.seconds(16, drafted=True)
    found.compare(16, 1e-12, drafted=True, in_use=8)
    assert 0.5 * before < found.seconds(16, drafted=True) < before


@pytest.mark.parametrize("measured", [{}, {1: math.nan}, {1: 0.010}, {16: 0.020, 1: math.inf}])
def test_where_sizes_could_not_be_compared_they_are_guessed(measured: dict[int, float]) -> None:
    found = StepCost()
    found.calibrate(measured, undrafted=0.009)
    assert found.measured == any(math.isfinite(seconds) for seconds in measured.values())
    ratio = found.seconds(16, drafted=True) / found.seconds(1, drafted=True)
    guess = StepCost()
    guessed_ratio = guess.seconds(16, drafted=True) / guess.seconds(1, drafted=True)
    assert ratio == pytest.approx(guessed_ratio)
    for rows, seconds in measured.items():
        if math.isfinite(seconds):
            assert found.seconds(rows, drafted=True) == pytest.approx(seconds)


def test_costs_are_learned_without_having_been_measured_first() -> None:
    true = cost(CPU)
    found = StepCost()
    for turn in range(400):
        found.learn(4, true.seconds(4, drafted=True), drafted=True)
        rows = (1, 8, 16)[turn % 3]
        found.compare(rows, true.seconds(rows, drafted=True), drafted=True, in_use=4)
    for rows in (1, 8, 16):
        expected = true.seconds(rows, drafted=True)
        assert found.seconds(rows, drafted=True) == pytest.approx(expected, rel=0.05)


# --- the choice -----------------------------------------------------------------------------------


def test_the_choice_is_the_size_with_the_most_tokens_per_second() -> None:
    heads = Heads(0.5, 0.15, 0.08, 0.04)
    calibration = heads.calibration()
    seconds = machine(CPU)
    shares = [share for _, share in calibration.paths]
    rates = {
        size: (1 + sum(shares[: size - 1])) / seconds(size, size > 1)
        for size in SIZES
        if size <= len(shares) + 1
    }
    tuner = begun(TreeTuner(HEADS, calibration), CPU)
    assert rates[tuner.tree.size] == max(rates.values())
    assert 2 <= tuner.tree.size <= 16
    news = tuner.news()
    assert news is not None
    assert news.chosen.tokens_per_step / news.chosen.step_ms == pytest.approx(
        max(rates.values()) / 1000, rel=0.02
    )
    assert tuner.news() is None


START = ["measured", "held up where it drafts", "nothing measured"]


@pytest.mark.parametrize("start", START)
@pytest.mark.parametrize("known", [True, False], ids=["calibrated", "guessed"])
@pytest.mark.parametrize("chances", [(0.4, 0.11, 0.055, 0.04), (0.6, 0.15, 0.08, 0.04), (0.15,)])
def test_the_best_tree_for_int8_kernels_is_found_from_wherever_it_begins(
    chances: tuple[float, ...], known: bool, start: str
) -> None:
    heads = Heads(*chances)
    calibration = heads.calibration(8000)
    true = StepCost()
    true.calibrate(INT8, undrafted=INT8_UNDRAFTED)
    tuner = TreeTuner(HEADS, calibration if known else None)
    if start != "nothing measured":
        slow = 2.5 if start == "held up where it drafts" else 1.0
        measured = {rows: s * (slow if rows > 1 else 1.0) for rows, s in INT8.items()}
        tuner.begin(measured, INT8_UNDRAFTED)
        assert slow == 1.0 or tuner.tree.size == 1
    sizes = run(tuner, heads, lambda rows, drafted: true.seconds(rows, drafted=drafted), 900)
    shares = [share for _, share in calibration.paths]
    rates = {
        size: (1 + sum(shares[: size - 1])) / true.seconds(size, drafted=size > 1)
        for size in SIZES
        if size <= len(shares) + 1
    }
    assert rates[sizes[-1]] > 0.94 * max(rates.values())
    assert (sizes[-1] > 1) == (chances[0] > 0.2)


def test_odd_timings_do_not_keep_it_from_choosing() -> None:
    heads, dice = Heads(0.6, 0.15, 0.08), random.Random(5)
    true = machine(CPU)
    tuner = TreeTuner(HEADS, heads.calibration())
    tuner.begin({1: math.nan, 4: 0.0, 16: math.inf}, math.nan)
    assert tuner.news() is None  # there is no time to tell of

    def odd(rows: int, drafted: bool) -> float:
        if dice.random() < 0.2:
            return dice.choice([math.nan, math.inf, 0.0, -1.0, 1e-9, 1e9])
        return true(rows, drafted)

    sizes = run(tuner, heads, odd, 800)
    rates = {tree.size: tokens / true(tree.size, tree.size > 1) for tree, tokens in tuner.trees()}
    assert rates[sizes[-1]] > 0.9 * max(rates.values())
    news = tuner.news()
    assert news is not None
    assert all(0 < option.step_ms < 1000 for option in news.options)


def test_where_rows_are_free_the_largest_tree_is_chosen() -> None:
    heads = Heads(0.5, 0.15, 0.08, 0.04)
    tuner = begun(TreeTuner(HEADS, heads.calibration()), GPU, draft=0.0)
    assert tuner.tree.size >= 48


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

    def noisy(rows: int, drafted: bool) -> float:
        return seconds(rows, drafted) * (3.0 if dice.random() < 0.02 else dice.uniform(0.9, 1.2))

    sizes = run(tuner, heads, noisy, 1500)
    assert changes(sizes) <= 8
    assert all(first / 2 <= size <= first * 2 for size in sizes)


@pytest.mark.parametrize("share", [0.6, 1.6])
def test_a_wrong_first_measurement_of_plain_decoding_is_corrected(share: float) -> None:
    """What is used is known at once; that the other is cheaper has to be found out."""
    heads, draft = Heads(0.45, 0.1), 0.003
    calibration = heads.calibration()
    true = machine(CPU, draft)

    def seconds(rows: int, drafted: bool) -> float:
        return true(rows, drafted) * (share if rows == 1 and not drafted else 1.0)

    tuner = begun(TreeTuner(HEADS, calibration), CPU, draft)
    assert tuner.tree.size > 1
    sizes = run(tuner, heads, seconds, 1200)
    rates = {
        tree.size: tokens / seconds(tree.size, tree.size > 1) for tree, tokens in tuner.trees()
    }
    assert rates[sizes[-1]] > 0.9 * max(rates.values())
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
