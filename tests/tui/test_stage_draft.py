"""Editing a split: layers are moved, never lost, and no stage is left without one."""

from __future__ import annotations

import random

from tui.stage_draft import StageDraft

LIVE = (15, 15)


def draft(*split: int, chosen: int = 0) -> StageDraft:
    return StageDraft(LIVE, split, chosen)


def test_a_boundary_moves_as_far_as_both_stages_keep_a_layer() -> None:
    assert draft(10, 10, 10).move(0, 12).split == (12, 8, 10)
    assert draft(10, 10, 10).move(1, 13).split == (10, 3, 17)
    assert draft(10, 10, 10).move(1, 99).split == (10, 19, 1)
    assert draft(10, 10, 10).move(1, 0).split == (10, 1, 19)
    assert draft(30).move(0, 3).split == (30,)


def test_a_stage_grows_from_the_one_behind_it_and_the_last_from_the_one_before() -> None:
    assert draft(10, 10, 10, chosen=1).grow(2).split == (10, 12, 8)
    assert draft(10, 10, 10, chosen=2).grow(2).split == (10, 8, 12)
    assert draft(10, 10, 10, chosen=0).grow(-20).split == (1, 19, 10)
    assert draft(30).grow(1).split == (30,)


def test_an_added_stage_takes_half_of_the_chosen_one_and_is_chosen() -> None:
    added = draft(15, 15).add()
    assert (added.split, added.chosen) == ((8, 7, 15), 1)
    assert not draft(1, 29).can_add
    assert draft(1, 29).add().split == (1, 29)


def test_a_removed_stage_leaves_its_layers_to_its_neighbours() -> None:
    assert draft(10, 9, 11, chosen=1).remove().split == (15, 15)
    assert draft(10, 9, 11, chosen=0).remove().split == (19, 11)
    last = draft(10, 9, 11, chosen=2).remove()
    assert (last.split, last.chosen) == ((10, 20), 1)
    assert not draft(30).can_remove
    assert draft(30).remove().split == (30,)


def test_an_even_split_differs_by_one_layer_at_most() -> None:
    assert draft(1, 1, 1, 27).even().split == (8, 8, 7, 7)


def test_a_draft_knows_whether_it_differs_and_goes_back() -> None:
    edited = draft(15, 15).grow(1)
    assert edited.changed
    assert not edited.revert().changed
    assert not edited.grow(-1).changed


def test_a_new_live_split_is_followed_unless_there_are_edits() -> None:
    assert draft(15, 15).follow((10, 20)).split == (10, 20)
    kept = draft(14, 16).follow((10, 20))
    assert (kept.split, kept.live) == ((14, 16), (10, 20))
    assert not draft(10, 20).follow((10, 20)).changed
    # Another model: what was drafted for 30 layers means nothing for 6.
    assert draft(14, 16, chosen=1).follow((6,)) == StageDraft((6,), (6,), 0)


def test_any_edits_keep_all_layers_and_leave_no_stage_empty() -> None:
    rng = random.Random(0)
    state = StageDraft.of((7, 1, 4))
    for _ in range(500):
        state = rng.choice(
            [
                lambda s: s.add(),
                lambda s: s.remove(),
                lambda s: s.even(),
                lambda s: s.grow(rng.randint(-5, 5)),
                lambda s: s.move(rng.randint(-1, 12), rng.randint(-3, 15)),
                lambda s: s.choose(rng.randint(-2, 14)),
            ]
        )(state)
        assert sum(state.split) == 12
        assert min(state.split) >= 1
        assert 0 <= state.chosen < len(state.split)
