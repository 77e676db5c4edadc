"""Draft trees built from lists of paths."""

from __future__ import annotations

import pytest

from engine.decoding.drafted import Drafted
from engine.decoding.tree import MC_63, PRESETS, ROOT_ONLY, build_tree, choose_tree
from engine.errors import ConfigError


def test_the_standard_presets_have_63_and_16_drafted_nodes() -> None:
    assert choose_tree("mc_63", 5).size == 64
    assert choose_tree("mc_16", 5).size == 17
    assert len(set(MC_63)) == 63
    assert choose_tree("auto", 5) == choose_tree("mc_63", 5)  # as large as it may get


def test_every_beginning_of_the_standard_list_is_a_tree() -> None:
    for n in range(1, 64):
        assert build_tree(MC_63[:n], 5).size == n + 1


def test_parents_come_before_children_and_tokens_follow_ranks() -> None:
    tree = build_tree([[1], [0, 2], [0], [0, 2, 1]], 3)
    assert tree.parents == (-1, 0, 0, 1, 3)
    assert tree.depths == (0, 1, 1, 2, 3)
    assert (tree.depth, tree.width) == (3, 3)
    drafted = Drafted([[10, 11], [20, 21, 22], [30, 31]])
    assert drafted.tokens(tree, 9) == [9, 10, 11, 22, 31]


def test_a_tree_is_trimmed_to_the_heads_there_are() -> None:
    for heads in (1, 2, 3):
        tree = choose_tree("mc_63", heads)
        assert tree.depth == heads
        assert tree.size == 1 + sum(len(path) <= heads for path in PRESETS["mc_63"])
    assert choose_tree("mc_63", 0) == ROOT_ONLY


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([[0], [1, 0]], r"path \[1, 0\] needs \[1\]"),
        ([[0], [0]], "given twice"),
        ([[n] for n in range(256)], "at most 255"),
    ],
)
def test_a_bad_list_of_paths_is_explained(paths: list[list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tree(paths, 5)
