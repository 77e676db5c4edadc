"""Chunks after a plan for other lengths."""

from __future__ import annotations

import pytest

from engine.planning.chunks import planned_chunks

PLAN = {"128": [64, 64], "256": [128, 96, 32]}


@pytest.mark.parametrize(
    ("rows", "chunks"),
    [
        (256, [128, 96, 32]),
        (128, [64, 64]),
        (70, [64, 6]),  # of the next longer prompt, as far as there are rows
        (10, [10]),
        (200, [128, 72]),
        (300, [128, 128, 44]),
        (600, [128, 128, 128, 128, 88]),
    ],
)
def test_a_prompt_between_the_planned_ones(rows: int, chunks: list[int]) -> None:
    assert planned_chunks(rows, PLAN) == chunks
