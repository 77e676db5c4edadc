"""How a prompt is cut into chunks that follow each other through the stages. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

MIN_CHUNK = 32
"""Below this a chunk costs as much as a longer one: the weights are read once either way."""


def prefill_chunks(
    rows: int, world: int, num_sub_sequences: int, max_sub_sequence_len: int
) -> list[int]:
    """Rows of each chunk of a prompt, in order; their sum is `rows`.

    Over several stages there are about `num_sub_sequences`, so that all stages work on the prompt
    at once, none of them tiny; one stage gains nothing by it and takes the longest.
    """
    size = max_sub_sequence_len
    if world > 1:
        size = min(size, max(MIN_CHUNK, math.ceil(rows / num_sub_sequences)))
    full, rest = divmod(rows, size)
    return [size] * full + ([rest] if rest else [])


def planned_chunks(rows: int, plan: Mapping[str, Sequence[int]]) -> list[int]:
    """Rows of each chunk after a plan for prompts of some lengths, its keys.

    The plan of the next longer prompt is followed as far as there are rows. Beyond the longest, its
    first chunk goes before as often as needed: the earlier a chunk, the longer it may be.
    """
    lengths = sorted(map(int, plan))
    length = next((each for each in lengths if each >= rows), lengths[-1])
    sizes = list(plan[str(length)])
    left = rows - length
    while left > 0:
        sizes.insert(0, sizes[0])
        left -= sizes[0]
    found, done = [], 0
    for size in sizes:
        if done < rows:
            found.append(min(size, rows - done))
            done += size
    return found
