"""How often each head is right, counted, and the draft trees that follow from it.

A count says how often the token at a depth was its head's candidate of some rank, given that the
tokens of the depths before were candidates too. Steps tell that whatever tree they tried: the
tokens that stand are looked up among all candidates, not only among those of the tree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from engine.decoding.calibrate import MISS, Path, Ranks, hit_path, steps
from engine.decoding.drafted import Drafted

CANDIDATES = 10
"""Candidates of each head that are looked at."""
MAX_DRAFTED = 63
"""Nodes besides the root of the largest tree that is made of counts."""
USUAL_DRAFTED = 15
"""Nodes besides the root of the tree whose steps a calibration counts."""


@dataclass(frozen=True)
class Acceptance:
    """Counts over some positions of a text: of a calibration, or live and faded.

    `seen[d]` positions told what became of depth d; in `hits[d][r]` of them the token was head d's
    candidate of rank r. `nodes` are the most frequent paths with their own counts, of all
    `seen[0]` positions; parents come first, and no path is more frequent than its parent.
    """

    seen: tuple[float, ...]
    hits: tuple[tuple[float, ...], ...]
    nodes: tuple[tuple[Path, float], ...] = ()

    @property
    def num_heads(self) -> int:
        """Depths that there are counts of."""
        return len(self.seen)

    def share(self, depth: int, rank: int) -> float:
        """How often head `depth` has the token at `rank`, where all heads before it had theirs."""
        seen = self.seen[depth]
        return self.hits[depth][rank] / seen if seen else 0.0

    @cached_property
    def paths(self) -> tuple[tuple[Path, float], ...]:
        """The most frequent paths with their shares of all positions."""
        if self.nodes and self.seen[0]:
            return tuple((path, count / self.seen[0]) for path, count in self.nodes)
        return self._products()

    def _products(self) -> tuple[tuple[Path, float], ...]:
        """Paths where only depths and ranks were counted: their shares multiplied."""
        found: list[tuple[Path, float]] = []
        open_paths: list[tuple[Path, float]] = [((), 1.0)]
        while open_paths and len(found) <= MAX_DRAFTED:
            path, share = max(open_paths, key=lambda each: (each[1], -len(each[0])))
            open_paths.remove((path, share))
            found.append((path, share))
            if len(path) < self.num_heads:
                shares = (share * self.share(len(path), rank) for rank in range(CANDIDATES))
                open_paths += [((*path, r), part) for r, part in enumerate(shares) if part > 0]
        return tuple(found[1:])

    def first(self, num_heads: int) -> Acceptance:
        """The counts of the first `num_heads` heads alone."""
        nodes = tuple(node for node in self.nodes if len(node[0]) <= num_heads)
        return Acceptance(self.seen[:num_heads], self.hits[:num_heads], nodes)


def count(positions: Iterable[Ranks], num_heads: int) -> Acceptance:
    """Counts of positions whose ranks are known (see calibrate.py), with the best paths."""
    seen = [0] * num_heads
    hits = [[0] * CANDIDATES for _ in range(num_heads)]
    paths: Counter[Path] = Counter()
    for ranks in positions:
        path = hit_path(ranks)
        paths.update(path[:end] for end in range(1, len(path) + 1))
        for depth, rank in enumerate(ranks):
            seen[depth] += 1
            if rank == MISS:
                break
            hits[depth][rank] += 1
    order = sorted(paths.items(), key=lambda node: (-node[1], len(node[0]), node[0]))
    return Acceptance(tuple(seen), tuple(map(tuple, hits)), tuple(order[:MAX_DRAFTED]))


def calibrated(answers: Sequence[Sequence[Ranks]], num_heads: int) -> Acceptance:
    """Counts of the steps that a tree of a usual size takes through `answers` (see calibrate.py).

    Not of all positions: a step skips those behind tokens that the heads were right about, which
    are easier than others, so that trees would promise some 5 % more than they hold.
    """
    counted = count((ranks for ranks, _ in steps(answers, [])), num_heads)
    usual = [path for path, _ in counted.paths[:USUAL_DRAFTED]]
    return count((ranks for ranks, _ in steps(answers, usual)), num_heads)


def guessed(num_heads: int) -> Acceptance:
    """What to begin with where nothing was counted: modest heads, as small new ones are.

    Less weight than a calibration's should go with it.
    """
    ranks = (0.40, 0.12, 0.06, 0.04, 0.03, 0.02, 0.015, 0.012, 0.01, 0.008)
    hits = tuple(tuple(0.85**depth * share for share in ranks) for depth in range(num_heads))
    return Acceptance((1.0,) * num_heads, hits)


class LiveAcceptance:
    """A start (a calibration, or a guess) corrected by what the latest steps told.

    Args:
        start: what is believed before the first step.
        weight: how many steps it counts as much as, for ever: where none come, it holds.
        memory: steps after which an older one has lost about two thirds of its weight.
    """

    def __init__(self, start: Acceptance, *, weight: float, memory: float = 128.0) -> None:
        self.start = start
        self._weight = weight
        self._fade = 1.0 - 1.0 / memory
        self._seen = [0.0] * start.num_heads
        self._hits = [[0.0] * CANDIDATES for _ in range(start.num_heads)]

    def observe(self, drafted: Drafted, tokens: Iterable[int]) -> None:
        """Learn from a step: what the heads had drafted, and the tokens that stand after it.

        A step tells nothing of the depths behind the first token that was no candidate, behind a
        node that no candidates were drafted at, or behind its last token.
        """
        path: Path = ()
        for depth, token in enumerate(tokens):
            candidates = drafted.behind(path)
            if not candidates:
                return
            self._seen[depth] = self._seen[depth] * self._fade + 1.0
            hits = self._hits[depth]
            for rank in range(CANDIDATES):
                hits[rank] *= self._fade
            rank = next(
                (r for r, each in enumerate(candidates[:CANDIDATES]) if each == token), MISS
            )
            if rank == MISS:
                return
            hits[rank] += 1.0
            path = (*path, rank)

    def share(self, depth: int, rank: int) -> float:
        """As `Acceptance.share`, with the start and the latest steps together."""
        start = self._weight * self.start.share(depth, rank)
        return (self._hits[depth][rank] + start) / (self._seen[depth] + self._weight)

    def paths(self) -> list[tuple[Path, float]]:
        """Paths by falling share of steps that would accept them; every beginning is a tree.

        Each is the start's, times how much oftener its depths and ranks were right lately.
        """
        corrections = [
            [_ratio(self.share(d, r), self.start.share(d, r)) for r in range(CANDIDATES)]
            for d in range(self.start.num_heads)
        ]
        shares: dict[Path, float] = {(): 1.0}
        before: dict[Path, float] = {(): 1.0}
        for path, share in self.start.paths:
            parent = path[:-1]
            part = share / before[parent] * corrections[len(parent)][path[-1]]
            shares[path] = shares[parent] * min(part, 1.0)
            before[path] = share
        del shares[()]
        return sorted(shares.items(), key=lambda node: (-node[1], len(node[0]), node[0]))


def _ratio(now: float, before: float) -> float:
    return now / before if before > 0 else 1.0
