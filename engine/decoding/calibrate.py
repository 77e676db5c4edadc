"""Trees from what heads were right about: counts of rank paths, and what a tree would gain.

A position's ranks say where the true tokens stood: ranks[h] is the place of the token h + 2 ahead
among head h's candidates, or MISS. Under greedy decoding they tell exactly what any tree accepts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

MISS = -1
"""The true token is not among the candidates."""

Ranks = Sequence[int]
Path = tuple[int, ...]


def hit_path(ranks: Ranks) -> Path:
    """The ranks up to the first miss: the longest path that a tree could have accepted."""
    path: list[int] = []
    for rank in ranks:
        if rank == MISS:
            break
        path.append(rank)
    return tuple(path)


def steps(
    answers: Iterable[Sequence[Ranks]], choices: Iterable[Sequence[int]]
) -> Iterator[tuple[Ranks, int]]:
    """The decode steps that the tree of `choices` would take, greedily.

    Args:
        answers: per answer the ranks at each position from the prompt's last on, the position
            of its last token left out.
        choices: paths, as of `medusa_choices`.

    Yields:
        Per step the ranks at its position, those of tokens behind the answer's end left out, and
        the tokens that it emits.
    """
    tree = {tuple(path) for path in choices}
    for positions in answers:
        at = 0
        while (left := len(positions) - at) > 0:
            ranks = positions[at][:left]
            path = hit_path(ranks)
            while path and path not in tree:
                path = path[:-1]
            # At the answer's end there is nothing left to be right about.
            emitted = min(len(path) + 1, left)
            yield ranks, emitted
            at += emitted


def tokens_per_step(answers: Iterable[Sequence[Ranks]], choices: Iterable[Sequence[int]]) -> float:
    """Tokens that a decode step emits on average; arguments as of `steps`, NaN for no steps."""
    emitted = [tokens for _, tokens in steps(answers, choices)]
    return sum(emitted) / len(emitted) if emitted else float("nan")
