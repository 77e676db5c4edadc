"""Which rank gets which rows: an order that depends on the seed alone, resumed anywhere."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest

from engine.training.args import TrainArguments
from engine.training.data import Sample, micro_batches, sequences
from engine.training.packing import pack

COUNT = 10


def samples(*lengths: int) -> list[Sample]:
    """Samples of these lengths, each filled with its number."""
    return [
        Sample(np.full(length, number), np.ones(length, dtype=bool))
        for number, length in enumerate(lengths)
    ]


def names(batch: list[Sample]) -> list[int]:
    return [int(sample.tokens[0]) for sample in batch]


def step(dp_size: int, consumed: int, steps: int = 1, **more: Any) -> list[list[int]]:
    """For each step the samples of all ranks, sorted."""
    values: dict[str, Any] = {"micro_batch_size": 1, "global_batch_size": 4, **more}
    in_order = values.pop("in_order", False)
    args = TrainArguments(**values)
    each = args.accumulation_steps(dp_size)
    found: list[list[int]] = [[] for _ in range(steps)]
    for rank in range(dp_size):
        batches = micro_batches(
            samples(*[1] * COUNT), args=args, dp_rank=rank, dp_size=dp_size,
            consumed_samples=consumed, in_order=in_order,
        )  # fmt: skip
        for index in range(steps):
            for batch in islice(batches, each):
                assert len(batch) == args.micro_batch_size
                found[index] += names(batch)
    return [sorted(each) for each in found]


@pytest.mark.parametrize(("dp_size", "size"), [(2, 1), (4, 1), (1, 4), (2, 2)])
def test_a_step_has_the_same_samples_however_many_ranks_share_it(dp_size: int, size: int) -> None:
    assert step(dp_size, 0, 8, micro_batch_size=size) == step(1, 0, 8)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_a_run_goes_on_exactly_where_it_stopped(dp_size: int) -> None:
    whole = step(1, 0, 9)
    for stop in range(9):
        assert step(dp_size, 4 * stop, 9 - stop) == whole[stop:]


def test_every_epoch_holds_each_sample_once_in_an_order_of_its_own() -> None:
    drawn = [name for batch in step(1, 0, 10, global_batch_size=2) for name in batch]
    assert Counter(drawn[:COUNT]) == Counter(drawn[COUNT:]) == Counter(range(COUNT))
    assert drawn[:COUNT] != drawn[COUNT:]
    assert step(1, 0, 5) != step(1, 0, 5, seed=43)


def test_rows_stay_in_file_order_where_that_is_asked() -> None:
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 8, 9]]
    assert step(1, 0, 3, dataloader_type="single") == expected
    assert step(1, 0, 3, in_order=True) == expected


def test_the_ranks_of_a_step_get_different_samples() -> None:
    (together,) = step(4, 0)
    assert len(set(together)) == 4


def test_packing_fills_sequences_and_loses_nothing() -> None:
    dice = random.Random(1)
    lengths = [dice.randint(1, 60) for _ in range(300)]
    bins = pack(lengths, 64, seed=1)
    assert sorted(number for chosen in bins for number in chosen) == list(range(300))
    filled = [sum(lengths[number] for number in chosen) for chosen in bins]
    assert max(filled) <= 64
    assert len(bins) <= 1.1 * sum(lengths) / 64 + 1
    assert bins == pack(lengths, 64, seed=1)
    assert bins != pack(lengths, 64, seed=2)


def test_a_row_longer_than_the_room_has_a_sequence_of_its_own() -> None:
    assert sorted(pack([9, 2, 2], 4, seed=1)) in ([[0], [1, 2]], [[0], [2, 1]])


def test_a_packed_micro_batch_holds_the_rows_of_its_sequences() -> None:
    rows = samples(*[3, 5, 2, 4, 6, 1] * 4)
    args = TrainArguments(packing=True, max_length=8, micro_batch_size=2, global_batch_size=4)
    units = sequences(rows, args)
    assert all(sum(map(len, unit)) <= 8 for unit in units)
    batches = [
        micro_batches(rows, args=args, dp_rank=rank, dp_size=2, consumed_samples=0)
        for rank in range(2)
    ]
    packs = Counter()  # type: Counter[int]
    for _ in range(len(units)):  # global batches of 4 sequences: each is seen 4 times
        for each in batches:
            batch = next(each)
            assert sum(map(len, batch)) <= 2 * 8
            packs.update(names(batch))
    assert set(packs.values()) == {4}
    assert len(packs) == len(rows)
