"""Steps before the first request: what trees of each size cost on these stages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from engine.decoding.acceptance import CANDIDATES
from engine.decoding.tree import MC_63, Tree, build_tree, with_chain
from engine.decoding.tuner import SIZES
from engine.pipeline.batch import Entry, Judge, encode_batch
from engine.pipeline.link import Kind, Link
from engine.pipeline.stage import Stage

BUDGET_S = 0.4
"""A start may take so much longer for it, and for the step that was begun by then."""
ORDER = (1, 16, 4, 64, 8, 32, 3, 12, 6, 2, 24, 5, 48)
"""Sizes whose cost tells most come first; the costs of those left out lie between."""
ALWAYS = 2
"""However slow the stages: of fewer sizes nothing could be compared."""
ROUNDS = 4
WARM_UP = 16
CONTEXT = 256
"""Tokens before the tree, of which a chat has some hundreds as a rule."""

assert set(ORDER) == set(SIZES)


def rehearse(
    stage: Stage,
    link: Link | None,
    last: int,
    *,
    context_length: int,
    largest: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[int, float], float, float]:
    """Take steps on rank 0 that belong to no request; rank `last` is the last stage.

    It receives their results itself: no other thread may do so yet. The rows that they leave in
    the KV cache are those of no sequence.

    Returns:
        Seconds of steps with drafting by all heads, by the nodes of their tree, up to about
        `largest`; of a step of one node without; and of one with drafting by one head. The least of
        each, as nothing but the step can make it longer.
    """
    start = max(0, min(CONTEXT, context_length - SIZES[-1]))
    sizes = list(dict.fromkeys(min(size, largest) for size in ORDER))
    deadline = clock() + BUDGET_S

    def seconds(nodes: int, draft_width: int = CANDIDATES, heads: int = 0) -> float:
        began = clock()
        most = heads or stage.model.heads.num_heads
        along = with_chain(build_tree(MC_63[: nodes - 1], most), most)
        _step(stage, link, last, _entry(start, nodes, draft_width, heads, along))
        return clock() - began

    seconds(min(WARM_UP, largest))
    undrafted = one_head = math.inf
    found: dict[int, float] = {}
    # More than once, if there is time: the first step of a size may have to set things up.
    for nodes in sizes * ROUNDS:
        if len(found) >= ALWAYS and clock() > deadline:
            break
        found[nodes] = min(found.get(nodes, math.inf), seconds(nodes))
        if nodes == 1:
            undrafted = min(undrafted, seconds(1, 0))
            one_head = min(one_head, seconds(1, heads=1))
    return found, undrafted, one_head


def _entry(start: int, nodes: int, draft_width: int, heads: int, along: Tree) -> Entry:
    return Entry(
        slot=0,
        start=start,
        tokens=[0] * nodes,
        parents=[-1, *[0] * (nodes - 1)],
        judge=Judge.TREE,
        draft_width=draft_width,
        draft_heads=heads,
        draft_tree=along,
    )


def _step(stage: Stage, link: Link | None, last: int, entry: Entry) -> None:
    hidden = stage.run([entry], None)
    if link is None:
        stage.judge([entry], hidden)
    else:
        link.send(1, Kind.BATCH, encode_batch([entry]), hidden)
        link.receive(last)
