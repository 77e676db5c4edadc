"""What moves when layers are shared out anew."""

from __future__ import annotations

from engine.pipeline.resplit import Move, decode_split, encode_split, layers_of, moves


def test_only_layers_that_change_hands_move_straight_to_their_new_stage() -> None:
    assert moves([2, 2, 2], [2, 2, 2]) == []
    assert moves([2, 2, 2], [1, 3, 2]) == [Move(1, 0, 1)]
    assert moves([2, 2, 2], [4, 1, 1]) == [Move(2, 1, 0), Move(3, 1, 0), Move(4, 2, 1)]
    assert moves([1, 1, 4], [4, 1, 1]) == [
        Move(1, 1, 0), Move(2, 2, 0), Move(3, 2, 0), Move(4, 2, 1)
    ]  # fmt: skip


def test_every_layer_belongs_to_one_stage() -> None:
    assert [layers_of([1, 3, 2], rank) for rank in range(3)] == [range(1), range(1, 4), range(4, 6)]


def test_a_split_and_its_rows_survive_the_message() -> None:
    for slots in ([], [(0, 17), (5, 3)]):
        assert decode_split(encode_split([1, 3, 2], slots)) == ([1, 3, 2], slots)
