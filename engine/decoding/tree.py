"""Draft trees: which candidates of the Medusa heads are tried together in one step.

A path such as (0, 2) names a node by ranks: the likeliest token of head 0, then the third
likeliest of head 1. Node 0 is the root, the token already known. (Medusa, Cai et al. 2024.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from engine.errors import ConfigError

# The shape of Medusa's standard tree of 63 drafted nodes for 7B models, as ranks per node in
# falling order of expected worth, so that every beginning of the list is a tree too.
_MC_63 = (
    "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 "
    "40 21 004 005 0000 011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 "
    "021 90 060 0001 16 070"
)
MC_63 = tuple(tuple(int(rank) for rank in path) for path in _MC_63.split())
# KV caches hold so many rows beyond the context, for a tree behind its last token.
MAX_NODES = 256
PRESETS = {"mc_63": MC_63, "mc_16": MC_63[:16]}


@dataclass(frozen=True)
class Level:
    """The nodes of one depth that have children, in the tree's order."""

    parents: list[int]
    """Place of each one's parent among those of the depth before."""
    ranks: list[int]
    """Its place among its parent's candidates."""


@dataclass(frozen=True)
class Tree:
    """A draft tree in the order its nodes enter the model: parents before children.

    `parents[i]` is the index of node i's parent (-1 for the root), `depths[i]` its distance from
    the root and `ranks[i]` its place among its head's candidates (0 for the root).
    """

    parents: tuple[int, ...]
    depths: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def size(self) -> int:
        """Nodes, root included."""
        return len(self.parents)

    @property
    def depth(self) -> int:
        """Medusa heads that the tree uses."""
        return max(self.depths)

    @cached_property
    def width(self) -> int:
        """Candidates that it needs of each head."""
        return max(self.ranks) + 1

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Ranks from the root to each drafted node, in the nodes' order."""
        found: list[tuple[int, ...]] = [()]
        for parent, rank in zip(self.parents[1:], self.ranks[1:], strict=True):
            found.append((*found[parent], rank))
        return tuple(found[1:])

    @cached_property
    def inner(self) -> tuple[int, ...]:
        """Nodes that have children, in order: those that candidates are needed at."""
        return tuple(sorted(set(self.parents[1:])))

    @cached_property
    def inner_places(self) -> dict[tuple[int, ...], int]:
        """Place among `inner` of each of them, by its path."""
        paths = ((), *self.paths)
        return {paths[node]: place for place, node in enumerate(self.inner)}

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The inner nodes by their depth, from the root on."""
        found: list[Level] = []
        places: dict[int, int] = {-1: 0}
        for depth in range(self.depth):
            nodes = [node for node in self.inner if self.depths[node] == depth]
            parents = [places[self.parents[node]] for node in nodes]
            found.append(Level(parents, [self.ranks[node] for node in nodes]))
            places = {node: place for place, node in enumerate(nodes)}
        return tuple(found)


ROOT_ONLY = Tree((-1,), (0,), (0,))


def build_tree(paths: Iterable[Sequence[int]], num_heads: int) -> Tree:
    """The tree of `paths`, without what is deeper than the heads there are.

    Raises:
        ConfigError: a path whose beginning is not in the list, or a path given twice.
    """
    wanted = [tuple(path) for path in paths]
    known = set(wanted)
    if len(known) >= MAX_NODES:
        raise ConfigError(f"key 'medusa_choices': {len(known)} paths; at most {MAX_NODES - 1} fit")
    if len(known) < len(wanted):
        raise ConfigError("key 'medusa_choices': a path is given twice")
    kept = sorted((p for p in known if len(p) <= num_heads), key=lambda p: (len(p), p))
    index: dict[tuple[int, ...], int] = {(): 0}
    for path in kept:
        if path[:-1] not in index:
            raise ConfigError(
                f"key 'medusa_choices': path {list(path)} needs {list(path[:-1])} in the list too"
            )
        index[path] = len(index)
    return Tree(
        parents=(-1, *(index[path[:-1]] for path in kept)),
        depths=(0, *(len(path) for path in kept)),
        ranks=(0, *(path[-1] for path in kept)),
    )


def choose_tree(
    choices: str | Sequence[Sequence[int]],
    num_heads: int,
    own: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> Tree:
    """The tree that `medusa_choices` names; one node where there are no heads.

    `own` are trees calibrated for these very heads; by name they go before the presets. With
    "auto" the tree changes (engine/decoding/tuner.py); this is one as large as it may get.
    """
    if num_heads == 0:
        return ROOT_ONLY
    if isinstance(choices, str):
        choices = {**PRESETS, **(own or {})}["mc_63" if choices == "auto" else choices]
    return build_tree(choices, num_heads)


@lru_cache(maxsize=64)
def with_chain(tree: Tree, depth: int) -> Tree:
    """The tree and the likeliest path of `depth` tokens, so that so many heads have work."""
    chain = [(0,) * length for length in range(1, depth + 1)]
    return build_tree({*tree.paths, *chain}, max(depth, tree.depth))


def depths_of(parents: Sequence[int]) -> list[int]:
    """Distance of each node from the root of its chain or tree; parents come first."""
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths


def children_of(parents: Sequence[int]) -> list[list[int]]:
    """Indices of each node's children, in order."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    return children
