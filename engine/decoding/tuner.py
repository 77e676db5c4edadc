"""The tuned tree: the size and shape with the most expected tokens per second.

What a tree of a size gains is known from how often the heads are right, what it costs from measured
steps. Small sizes pay on a CPU, where every row is work; on a GPU 64 rows are nearly free. No
drafting at all is one of the choices. What is emitted does not depend on the tree, but for typical
acceptance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from engine.decoding.acceptance import CANDIDATES, Acceptance, LiveAcceptance, guessed
from engine.decoding.calibrate import Path
from engine.decoding.drafted import Drafted
from engine.decoding.step_cost import StepCost
from engine.decoding.tree import ROOT_ONLY, Tree, build_tree, with_chain
from engine.protocol import TreeChosen, TreeOption

SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
"""Nodes of the trees to choose from, root included: few, so that shapes repeat."""
DECIDE_EVERY = 16
"""Steps between two decisions, as long as the number of sequences stays the same."""
COMPARE_EVERY = 32
"""Steps between two with another tree than that in use; its cost would not be known otherwise."""
PLAIN_DRAFT_EVERY = 16
"""Without drafting, steps between two that draft, to learn whether the heads are right by now."""
LEARN_EVERY = 8
"""Steps between two that ask all heads, also those that are deeper than the tree in use."""
ADVANTAGE = 1.03
"""Another tree has to promise so much more than the one in use: estimates move all the time."""
CALIBRATED_WEIGHT, GUESSED_WEIGHT = 32.0, 8.0
"""Steps that a calibration, at most, and a guess count as much as."""

# What may need another tree comes after a step that asks all heads.
assert DECIDE_EVERY % LEARN_EVERY == COMPARE_EVERY % LEARN_EVERY == 0
assert DECIDE_EVERY % PLAIN_DRAFT_EVERY == 0


class Drafting(Protocol):
    """Where the scheduler has its trees from."""

    tree: Tree
    """In use, or to be used next."""

    @property
    def width(self) -> int:
        """Candidates that the step put together now is to draft of each head; 0 for none."""

    @property
    def heads(self) -> int:
        """How many heads it is to ask, the first ones; 0 for none."""

    @property
    def along(self) -> Tree | None:
        """The tree that sequential heads are to draft along; None for other heads, or for none."""

    def step(self, sequences: int) -> Tree:
        """The tree for a decode step of so many sequences, which is put together now."""

    def observe(self, drafted: Drafted, tokens: Iterable[int]) -> None:
        """After a step: what had been drafted for it, and the tokens that stand."""

    def timed(self, rows: int, seconds: float, *, tree: Tree, heads: int) -> None:
        """A decode step that was alone in the pipeline took so long, all its work included.

        rows: of all its sequences; heads: asked at its end, 0 for none.
        """

    def news(self) -> TreeChosen | None:
        """What is to be told about the choice, once."""


class FixedTree:
    """A tree that the config names: nothing is learned."""

    def __init__(self, tree: Tree, *, sequential: bool = False) -> None:
        self.tree = tree
        self.along = tree if sequential and tree.depth else None
        self.width = tree.width if tree.depth else 0
        self.heads = tree.depth

    def step(self, sequences: int) -> Tree:
        """Always the same."""
        return self.tree

    def observe(self, drafted: Drafted, tokens: Iterable[int]) -> None:
        """Nothing."""

    def timed(self, rows: int, seconds: float, *, tree: Tree, heads: int) -> None:
        """Nothing."""

    def news(self) -> None:
        """Nothing."""


@dataclass(frozen=True)
class _Gain:
    """What a tree promises for a number of sequences."""

    tree: Tree
    tokens: float
    """Expected of a step, per sequence."""
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class TreeTuner:
    """Chooses the tree from live acceptance and measured costs; a `Drafting`.

    Args:
        num_heads: of the engine; one at least.
        calibration: counts stored beside the heads; a guess where there are none, or of fewer
            heads.
        sequential: the heads see what was drafted before them, so that they draft along a tree.
    """

    def __init__(
        self,
        num_heads: int,
        calibration: Acceptance | None = None,
        *,
        sequential: bool = False,
    ) -> None:
        if calibration is None or calibration.num_heads < num_heads or not calibration.seen[0]:
            self._live = LiveAcceptance(guessed(num_heads), weight=GUESSED_WEIGHT)
        else:
            start = calibration.first(num_heads)
            self._live = LiveAcceptance(start, weight=min(CALIBRATED_WEIGHT, start.seen[0]))
        self.cost = StepCost()
        self.tree = ROOT_ONLY
        self._num_heads = num_heads
        self._sequential = sequential
        self._first_head = 1.0 / num_heads
        self._sequences = 1
        self._steps = 0
        self._turn = 0
        self._tried = self.tree
        self._expected: Tree | None = None
        """Of the next step; None where that was not asked yet."""
        self._news: TreeChosen | None = None
        self._decide()

    @property
    def width(self) -> int:
        """See Drafting. All candidates: those that the tree does not try are learned from too."""
        return CANDIDATES if self.heads else 0

    @property
    def heads(self) -> int:
        """See Drafting: mostly those of the tree in use, sometimes all, to learn from them."""
        after = self._steps + 1
        if self.tree.size == 1:
            return 0 if after % PLAIN_DRAFT_EVERY else self._num_heads
        if self._tried.size == 1:
            return 0  # a step without drafts is compared as one
        return self.tree.depth if after % LEARN_EVERY else self._num_heads

    @property
    def along(self) -> Tree | None:
        """See Drafting: that of the next step, as far as it is known now."""
        if not self._sequential or not self.heads:
            return None
        if self._expected is None:
            after = self._steps + 1
            self._expected = self._other(self._turn + 1) if self._compares(after) else self.tree
        return with_chain(self._expected, self.heads)

    def _compares(self, step: int) -> bool:
        every = COMPARE_EVERY if self.tree.size > 1 else PLAIN_DRAFT_EVERY
        return step % every == 0

    def largest(self) -> Tree:
        """The largest tree that may be chosen."""
        return self.trees()[-1][0]

    def begin(
        self, measured: dict[int, float], undrafted: float, one_head: float = math.nan
    ) -> None:
        """Choose freely from costs that were measured before the first request.

        Args:
            measured: seconds of steps with drafting by all heads, by the nodes of their tree.
            undrafted: seconds of a step of one node without.
            one_head: seconds of a step of one node with drafting by one head.

        What is no duration is passed over; the first steps then tell what is missing.
        """
        self.cost.calibrate(measured, undrafted=undrafted)
        drafting = measured.get(1, math.nan) - undrafted
        if drafting > 0 and undrafted < one_head < math.inf:
            self._first_head = min(1.0, (one_head - undrafted) / drafting)
        self.tree = ROOT_ONLY
        self._decide()

    def step(self, sequences: int) -> Tree:
        """See Drafting: mostly the tree in use, sometimes another one, to know its cost."""
        self._steps += 1
        if sequences != self._sequences or self._steps % DECIDE_EVERY == 0:
            self._sequences = sequences
            self._decide()
        self._tried, self._expected = self.tree, None
        if self._compares(self._steps):
            self._turn += 1
            self._tried = self._other(self._turn)
        return self._tried

    def observe(self, drafted: Drafted, tokens: Iterable[int]) -> None:
        """See Drafting."""
        self._live.observe(drafted, tokens)

    def timed(self, rows: int, seconds: float, *, tree: Tree, heads: int) -> None:
        """See Drafting."""
        if rows != self._sequences * tree.size:
            return  # nothing had been drafted for some of the sequences
        drafting = self._drafting(heads)
        if tree.size != self.tree.size:
            self.cost.compare(rows, seconds, drafting=drafting)
        elif tree.size == 1 and heads:
            self.cost.compare_drafting(rows, seconds, drafting=drafting)
        else:
            self.cost.learn(rows, seconds, drafting=drafting)

    def news(self) -> TreeChosen | None:
        """See Drafting; nothing before a step was timed."""
        if not self.cost.measured:
            return None
        news, self._news = self._news, None
        return news

    def _decide(self) -> None:
        gains = [self._gain(*each) for each in self.trees()]
        best = max(gains, key=_rate)
        now = self._gain(self.tree, self.expected_tokens(self.tree))
        if best.rate > ADVANTAGE * now.rate:
            self.tree, now = best.tree, best
        self._news = TreeChosen(
            nodes=now.tree.size,
            depth=now.tree.depth,
            sequences=self._sequences,
            chosen=_option(now),
            options=tuple(_option(gain) for gain in gains),
        )

    def _gain(self, tree: Tree, tokens: float) -> _Gain:
        rows = self._sequences * tree.size
        return _Gain(tree, tokens, self.cost.seconds(rows, drafting=self._drafting(tree.depth)))

    def _drafting(self, heads: int) -> float:
        """What asking so many heads costs, as a part of asking all."""
        if heads in (0, self._num_heads):
            return float(heads > 0)
        return self._first_head + (1.0 - self._first_head) * (heads - 1) / (self._num_heads - 1)

    def trees(self) -> list[tuple[Tree, float]]:
        """The best tree of each size there is, with the tokens that a step is expected to make."""
        paths = self._live.paths()
        most = len(paths) + 1
        sizes = [size for size in SIZES if size < most] + [min(most, SIZES[-1])]
        found = []
        for size in sizes:
            taken = paths[: size - 1]
            tree = _tree(tuple(path for path, _ in taken))
            found.append((tree, 1.0 + sum(share for _, share in taken)))
        return found

    def expected_tokens(self, tree: Tree) -> float:
        """What a step with the tree is expected to make now."""
        shares = dict(self._live.paths())
        return 1.0 + sum(shares.get(path, 0.0) for path in tree.paths)

    def _other(self, turn: int) -> Tree:
        """By turns the most promising of the others, one larger, none at all, one smaller.

        What promises least is tried as well: its cost may have been taken for too high.
        """
        gains = [self._gain(*each) for each in self.trees()]
        others = [gain for gain in gains if gain.tree.size != self.tree.size]
        if not others:
            return self.tree
        smaller = [gain.tree for gain in others if gain.tree.size < self.tree.size]
        larger = [gain.tree for gain in others if gain.tree.size > self.tree.size]
        best = max(others, key=_rate).tree
        match turn % 4:
            case 1:
                return best
            case 2:
                return larger[0] if larger else best
            case 3:
                return smaller[0] if smaller else best
            case _:
                return smaller[-1] if smaller else best


def _rate(gain: _Gain) -> float:
    return gain.rate


@lru_cache(maxsize=64)
def _tree(paths: tuple[Path, ...]) -> Tree:
    return build_tree(paths, len(max(paths, key=len))) if paths else ROOT_ONLY


def _option(gain: _Gain) -> TreeOption:
    return TreeOption(gain.tree.size, gain.tokens, 1000.0 * gain.seconds)
