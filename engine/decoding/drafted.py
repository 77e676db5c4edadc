"""What the heads drafted for a sequence's next step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from engine.decoding.calibrate import Path
from engine.decoding.tree import ROOT_ONLY, Tree, build_tree


@dataclass(frozen=True)
class Drafted:
    """Lists of candidates, likeliest first.

    Heads that do not see what was drafted before have one list each, whatever the path. Sequential
    heads ("hydra") have one for each inner node of the tree that they drafted along.
    """

    lists: Sequence[Sequence[int]] = field(default_factory=list)
    tree: Tree | None = None
    """Along which sequential heads drafted; None for other heads."""

    def behind(self, path: Path) -> Sequence[int]:
        """Candidates for the token behind the root and `path`; none where none were drafted."""
        if self.tree is None:
            place = len(path)
        else:
            place = self.tree.inner_places.get(path, len(self.lists))
        return self.lists[place] if place < len(self.lists) else ()

    def cut(self, tree: Tree) -> Tree:
        """The part of `tree` that there are candidates for.

        Heads that each have one list drafted for all of it, or else for another tree: then none.
        """
        if self.tree is None:
            return tree if len(self.lists) >= tree.depth else ROOT_ONLY
        return _cut(tree, self.tree, len(self.lists[0])) if self.lists else ROOT_ONLY

    def tokens(self, tree: Tree, root: int) -> list[int]:
        """Token of every node of a tree that `cut` has left."""
        return [root, *(self.behind(path[:-1])[path[-1]] for path in tree.paths)]


@lru_cache(maxsize=256)
def _cut(tree: Tree, along: Tree, width: int) -> Tree:
    known = [p for p in tree.paths if p[:-1] in along.inner_places and p[-1] < width]
    if len(known) == len(tree.paths):
        return tree
    return build_tree(known, along.depth) if known else ROOT_ONLY
