"""Best trees and what they gain, from ranks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.head_choices import best_choices, read_acceptance, write_acceptance
from engine.checkpoint.sources import resolve_cached
from engine.decoding.acceptance import calibrated, count
from engine.decoding.calibrate import MISS, tokens_per_step
from engine.decoding.tree import MC_63, build_tree, choose_tree
from engine.errors import CheckpointError

POSITIONS = [[0, 0], [0, 0], [0, 1], [1, MISS], [MISS, 0]]


def test_the_best_tree_is_the_most_frequent_paths() -> None:
    assert count(POSITIONS, 2).paths == (((0,), 0.6), ((0, 0), 0.4), ((1,), 0.2), ((0, 1), 0.2))


def test_every_best_tree_is_a_tree() -> None:
    dice = random.Random(0)
    positions = [[dice.choice([MISS, 0, 0, 1, 2]) for _ in range(5)] for _ in range(300)]
    paths = [path for path, _ in count(positions, 5).paths]
    for nodes in (1, 4, 16, 63):
        assert build_tree(paths[:nodes], 5).size == nodes + 1


def test_steps_follow_the_accepted_paths() -> None:
    # Both tokens right, then none, then one that the tree does not try.
    answer = [[0, 0], [9, 9], [9, 9], [MISS, 0], [2, 0]]
    assert tokens_per_step([answer], [[0], [0, 0]]) == pytest.approx(5 / 3)
    assert tokens_per_step([answer], []) == 1.0


def test_an_answer_ends_where_it_ends() -> None:
    assert tokens_per_step([[[0, 0, 0]]], [[0], [0, 0], [0, 0, 0]]) == 1.0


def test_a_calibration_promises_what_the_steps_of_a_tree_make() -> None:
    # Easy stretches between hard ones: of the easy positions most are skipped.
    dice = random.Random(1)
    answers = []
    for _ in range(40):
        stretches = [[MISS, 0][i % 2 :][:1] * dice.randint(1, 9) for i in range(20)]
        ranks = [rank for stretch in stretches for rank in stretch]
        answers.append([ranks[at : at + 3] for at in range(len(ranks) - 3)])
    everywhere = count((ranks for positions in answers for ranks in positions), 3)
    for nodes in (1, 2, 3):
        tree = [path for path, _ in everywhere.paths[:nodes]]
        made = tokens_per_step(answers, tree)
        promised = 1 + sum(share for _, share in calibrated(answers, 3).paths[:nodes])
        assert promised == pytest.approx(made, rel=0.1)
    assert 1 + sum(share for _, share in everywhere.paths[:3]) > 1.2 * made


def test_acceptance_stored_beside_the_heads_goes_before_the_presets(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 2}')
    assert read_acceptance(tmp_path) is None
    assert best_choices(None) == {}
    counted = count(POSITIONS, 2)
    write_acceptance(tmp_path, counted)
    assert json.loads((tmp_path / "config.json").read_text())["medusa_num_heads"] == 2
    assert read_acceptance(tmp_path / "medusa_lm_head.safetensors") == counted
    assert choose_tree("mc_16", 2, best_choices(counted)).paths == ((0,), (1,), (0, 0), (0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seen": "many"}, "Expected `array`"),
        ({"hits": [[1.0] * 10]}, "seen and hits"),
        ({"nodes": [[[0, 0], 3]]}, r"node \[0, 0\] must follow \[0\]"),
        ({"nodes": [[[0], 3], [[0, 0], 4]]}, r"node \[0, 0\] must follow \[0\]"),
        ({"nodes": [[[99], 3]]}, "Expected `int` <= 9"),
    ],
)
def test_broken_stored_counts_are_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    good = {"seen": [5, 3], "hits": [[1] * 10, [1] * 10], "nodes": [[[0], 3]]}
    (tmp_path / "config.json").write_text(json.dumps({"medusa_acceptance": {**good, **change}}))
    with pytest.raises(CheckpointError, match=rf"config\.json: key 'medusa_acceptance': {message}"):
        read_acceptance(tmp_path)


def test_the_bundled_heads_bring_their_counts_and_trees_of_their_own() -> None:
    heads = resolve_cached("bundled:smollm2-135m-instruct-medusa")
    assert heads is not None
    acceptance = read_acceptance(heads)
    assert acceptance is not None and acceptance.num_heads == 5
    assert acceptance.seen[0] > 1000 and len(acceptance.nodes) == 63
    own = best_choices(acceptance)
    for name, preset in (("mc_16", MC_63[:16]), ("mc_63", MC_63)):
        tree = choose_tree(name, 5, own)
        assert tree.size == len(preset) + 1
        assert set(tree.paths) == set(map(tuple, own[name])) != set(preset)
