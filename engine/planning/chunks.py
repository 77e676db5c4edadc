"""How a prompt is cut into chunks that follow each other through the stages. Pure."""

from __future__ import annotations

import math

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
