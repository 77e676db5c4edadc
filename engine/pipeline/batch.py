"""What flows through the stages: micro-batches one way, results back.

A micro-batch is ragged rows of any number of sequences. Stages keep no state of a sequence but
its KV rows: each entry says where its rows start, so a slot is reused by simply starting at 0,
and a cancelled sequence by never coming again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from engine.decoding.accept import AcceptRule
from engine.decoding.tree import MAX_NODES, ROOT_ONLY, Tree, depths_of
from engine.model.kv_cache import KVCache, KVStore
from engine.model.llama import Group, Rows, Segment


class Judge(IntEnum):
    """Which rows of an entry the last stage turns into a result."""

    NONE = 0
    """A prefill chunk that is not the last."""
    LAST = 1
    """The last prefill chunk: what follows its last token."""
    TREE = 2
    """A decode step: every node of the tree."""


class Copy(NamedTuple):
    """A fork: the first rows of one slot are copied into another, once, on every stage."""

    source: int
    slot: int
    rows: int


@dataclass
class Entry:
    """Some rows of one sequence."""

    slot: int
    """Which KV cache of every stage is the sequence's."""
    start: int
    """KV rows before these; the first token's position."""
    tokens: list[int]
    parents: list[int]
    """Index of each token's parent among `tokens`, -1 for one that follows the cache's end."""
    judge: Judge
    keep: list[int] = field(default_factory=list)
    """KV rows of the step before that were accepted, to be moved before this step."""
    keep_to: int = 0
    """Where the first of them goes."""
    draft_width: int = 0
    """Candidates wanted of each Medusa head."""
    draft_heads: int = 0
    """How many heads are to draft, the first ones; 0 for all of them."""
    draft_tree: Tree | None = None
    """That sequential heads are to draft along; the same for all entries of a micro-batch."""
    rule: AcceptRule = field(default_factory=AcceptRule)
    point: int = 0
    """The point of an outline answer that the sequence writes, from 1; only for figures."""
    copies: list[Copy] = field(default_factory=list)
    """To be carried out before all else, in order; not only of this entry's slot."""


@dataclass
class Result:
    """What the last stage makes of one judged entry."""

    path: list[int]
    """Accepted nodes, root first."""
    next_token: int
    candidates: list[list[int]]
    """Lists of likeliest tokens, for the next step's tree; see Drafted."""


_ENTRY = struct.Struct("<12q4d")
_NUMBERS = struct.Struct("<16q")


def encode_batch(entries: Sequence[Entry], crowd: int = 1) -> list[int]:
    """The entries as int64 numbers; floats travel as their bit patterns.

    `crowd`: how many stages are at work at a time, with this micro-batch and with others.
    """
    numbers = [len(entries), crowd]
    for e in entries:
        r = e.rule
        head = _ENTRY.pack(
            *(e.slot, e.start, len(e.tokens), len(e.keep), e.keep_to, e.judge, e.draft_width),
            *(e.draft_heads, e.point, len(e.copies), r.rule, r.seed),
            *(r.temperature, r.top_p, r.posterior_threshold, r.posterior_alpha),
        )
        numbers += _NUMBERS.unpack(head)
        numbers += e.tokens
        numbers += e.parents
        numbers += e.keep
        tree = e.draft_tree or ROOT_ONLY
        numbers += (tree.size, *tree.parents, *tree.ranks)
        for copy in e.copies:
            numbers += copy
    return numbers


def decode_batch(numbers: list[int]) -> list[Entry]:
    """The inverse of `encode_batch`."""
    take = _Reader(numbers)
    entries = []
    count, _ = take.many(2)
    for _ in range(count):
        fields = _ENTRY.unpack(_NUMBERS.pack(*take.many(16)))
        slot, start, n, kept, keep_to, judge, width, heads, *others = fields
        point, copies, rule, seed, *floats = others
        temperature, top_p, threshold, alpha = floats
        entries.append(
            Entry(
                slot=slot,
                start=start,
                tokens=take.many(n),
                parents=take.many(n),
                keep=take.many(kept),
                keep_to=keep_to,
                judge=Judge(judge),
                draft_width=width,
                draft_heads=heads,
                draft_tree=_tree(take),
                rule=AcceptRule(rule, temperature, top_p, threshold, alpha, seed),
                point=point,
                copies=[Copy(*take.many(3)) for _ in range(copies)],
            )
        )
    return entries


def _tree(take: _Reader) -> Tree | None:
    size = take.one()
    tree = _same_tree(tuple(take.many(size)), tuple(take.many(size)))
    return tree if tree.depth else None


@lru_cache(maxsize=64)
def _same_tree(parents: tuple[int, ...], ranks: tuple[int, ...]) -> Tree:
    """One object for equal trees, which keeps what it has worked out."""
    return Tree(parents, tuple(depths_of(parents)), ranks)


def crowd_of(numbers: Sequence[int]) -> int:
    """How many stages are at work at a time; see `encode_batch`."""
    return numbers[1]


def encode_results(results: Sequence[Result]) -> list[int]:
    """Results as int64 numbers."""
    numbers = [len(results)]
    for r in results:
        width = len(r.candidates[0]) if r.candidates else 0
        numbers += [len(r.path), r.next_token, len(r.candidates), width, *r.path]
        for tokens in r.candidates:
            numbers += tokens
    return numbers


def decode_results(numbers: list[int]) -> list[Result]:
    """The inverse of `encode_results`."""
    take = _Reader(numbers)
    results = []
    for _ in range(take.one()):
        length, token, heads, width = take.many(4)
        path = take.many(length)
        results.append(Result(path, token, [take.many(width) for _ in range(heads)]))
    return results


class _Reader:
    def __init__(self, numbers: list[int]) -> None:
        self.numbers, self.at = numbers, 0

    def one(self) -> int:
        return self.many(1)[0]

    def many(self, n: int) -> list[int]:
        self.at += n
        return self.numbers[self.at - n : self.at]


def row_slices(entries: Sequence[Entry]) -> Iterator[slice]:
    """Where each entry's rows lie in the micro-batch."""
    at = 0
    for entry in entries:
        yield slice(at, at + len(entry.tokens))
        at += len(entry.tokens)


def attention_rows(
    entries: Sequence[Entry],
    store: KVStore,
    *,
    groups: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Rows:
    """Positions and masks of a micro-batch, the same for every layer.

    Entries of the same shape whose slots lie in one cache attend together.

    `groups` is the number of query heads that share a KV head (see Segment.mask).
    """
    positions: list[int] = []
    places: list[_Place] = []
    for entry, rows in zip(entries, row_slices(entries), strict=True):
        positions += [entry.start + depth for depth in depths_of(entry.parents)]
        places.append(_Place(entry, rows, *store.find(entry.slot)))
    out = Rows(torch.tensor(positions, device=device), [])
    for alike in _alike(places):
        if len(alike) > 1:
            out.groups.append(_group(alike, groups, dtype, device))
        else:
            out.segments.append(_segment(alike[0], groups, dtype, device))
    return out


@dataclass
class _Place:
    entry: Entry
    rows: slice
    cache: KVCache
    slot: int


def _alike(places: Sequence[_Place]) -> list[list[_Place]]:
    """Entries that can attend together, by slot; every other one alone."""
    found: dict[object, list[_Place]] = {}
    for place in places:
        alone = len(place.entry.tokens) > MAX_NODES  # a long chunk fills the machine by itself
        key = place.rows.start if alone else (id(place.cache), tuple(place.entry.parents))
        found.setdefault(key, []).append(place)
    return [sorted(alike, key=lambda place: place.slot) for alike in found.values()]


def _segment(place: _Place, groups: int, dtype: torch.dtype, device: torch.device) -> Segment:
    entry, mask = place.entry, None
    if len(entry.tokens) > 1:
        seen = _ancestors(tuple(entry.parents), dtype).to(device)
        mask = torch.nn.functional.pad(seen, (entry.start, 0)).repeat(groups, 1)
    return Segment(place.rows, place.cache, place.slot, entry.start, mask)


def _group(alike: Sequence[_Place], groups: int, dtype: torch.dtype, device: torch.device) -> Group:
    n = len(alike[0].entry.tokens)
    starts = torch.tensor([place.entry.start for place in alike])
    slots = torch.tensor([place.slot for place in alike])
    first_rows = torch.tensor([place.rows.start for place in alike])
    span = slice(alike[0].slot, alike[-1].slot + 1)
    end = int(starts.max()) + n
    own = slots - span.start
    places = starts[:, None] + torch.arange(n)
    mask = torch.zeros(span.stop - span.start, 1, n, end, dtype=dtype)
    hidden = torch.arange(end) >= starts[:, None]
    mask[own, 0] = hidden[:, None].to(dtype).masked_fill_(hidden[:, None], float("-inf"))
    ancestors = _ancestors(tuple(alike[0].entry.parents), dtype)
    mask[own[:, None, None], 0, torch.arange(n)[:, None], places[:, None]] = ancestors
    return Group(
        rows=(first_rows[:, None] + torch.arange(n)).to(device),
        cache=alike[0].cache,
        slots=slots[:, None].to(device),
        places=places.to(device),
        span=span,
        end=end,
        mask=mask.repeat(1, 1, groups, 1).to(device),
    )


@lru_cache(maxsize=64)
def _ancestors(parents: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Additive mask [n, n]: 0 where the column is the row itself or one of its ancestors."""
    n = len(parents)
    seen = torch.zeros(n, n, dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] = seen[parent]
        seen[node, node] = True
    return torch.zeros(n, n, dtype=dtype).masked_fill_(~seen, float("-inf"))
