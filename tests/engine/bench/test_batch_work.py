"""What the batch bench asks."""

from __future__ import annotations

from engine.bench.batch_work import COUNT, LONGEST, SHORTEST, lengths, prompts
from engine.bench.padded import cut


def test_prompts_differ_and_lengths_are_the_same_in_every_run() -> None:
    assert len(set(prompts())) == COUNT
    assert lengths(COUNT) == lengths(COUNT)
    assert SHORTEST <= min(lengths(COUNT)) <= max(lengths(COUNT)) <= LONGEST
    assert max(lengths(COUNT)) - min(lengths(COUNT)) > 200


def test_a_padded_answer_is_cut_at_its_own_limit_or_end() -> None:
    assert cut([5, 6, 7, 8], 3, [9]) == (5, 6, 7)
    assert cut([5, 9, 7, 8], 3, [9]) == (5, 9)
    assert cut([5, 6], 3, []) == (5, 6)
