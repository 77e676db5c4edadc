"""Best trees and what they gain, from ranks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from engine.checkpoint.head_choices import read_choices, write_choices
from engine.decoding.calibrate import MISS, best_choices, tokens_per_step
from engine.decoding.tree import build_tree, choose_tree
from engine.errors import CheckpointError


def test_the_best_tree_is_the_most_frequent_paths() -> None:
    positions = [[0, 0], [0, 0], [0, 1], [1, MISS], [MISS, 0]]
    assert best_choices(positions, 3) == [[0], [0, 0], [1]]


def test_every_best_tree_is_a_tree() -> None:
    dice = random.Random(0)
    positions = [[dice.choice([MISS, 0, 0, 1, 2]) for _ in range(5)] for _ in range(300)]
    for nodes in (1, 4, 16, 63):
        assert build_tree(best_choices(positions, nodes), 5).size == nodes + 1


def test_steps_follow_the_accepted_paths() -> None:
    # Both tokens right, then none, then one that the tree does not try.
    answer = [[0, 0], [9, 9], [9, 9], [MISS, 0], [2, 0]]
    assert tokens_per_step([answer], [[0], [0, 0]]) == pytest.approx(5 / 3)
    assert tokens_per_step([answer], []) == 1.0


def test_an_answer_ends_where_it_ends() -> None:
    assert tokens_per_step([[[0, 0, 0]]], [[0], [0, 0], [0, 0, 0]]) == 1.0


def test_trees_stored_beside_the_heads_go_before_the_presets(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 2}')
    assert read_choices(tmp_path) == {}
    write_choices(tmp_path, {"mc_16": [[0], [0, 1]]})
    assert json.loads((tmp_path / "config.json").read_text())["medusa_num_heads"] == 2
    own = read_choices(tmp_path / "medusa_lm_head.safetensors")
    assert choose_tree("mc_16", 2, own).ranks == (0, 0, 1)
    assert choose_tree("auto", 2, own).size == 3
    assert choose_tree("mc_63", 2, own) == choose_tree("mc_63", 2)


def test_broken_stored_trees_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"medusa_choices": {"mc_16": [0]}}')
    with pytest.raises(CheckpointError, match=r"config\.json: key 'medusa_choices'"):
        read_choices(tmp_path)
