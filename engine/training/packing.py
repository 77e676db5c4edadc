"""Packing: samples put together to sequences of at most a given length. Free of torch."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], room: int, seed: int) -> list[list[int]]:
    """Bins of sample numbers, each at most `room` tokens together (best fit, in a seeded order).

    A sample that is longer than `room` gets a bin of its own. The bins depend on nothing but the
    arguments.
    """
    order = list(range(len(lengths)))
    random.Random(f"{seed}/packing").shuffle(order)
    bins: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for sample in order:
        length = lengths[sample]
        place = bisect_left(left, (length, -1))
        if place < len(left):
            free, index = left.pop(place)
            bins[index].append(sample)
        else:
            free, index = room, len(bins)
            bins.append([sample])
        if free > length:
            insort(left, (free - length, index))
    return bins
