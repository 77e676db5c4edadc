"""Which drafted tokens stand: greedy, typical and sample-and-match acceptance.

Every random choice is keyed by (seed, position of the token in its sequence), never by the order
of calls. So a seeded answer is the same whatever the tree, the split or the rest of the batch,
and a sequence can be replayed after a failure.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.decoding.tree import children_of

GREEDY, TYPICAL, NUCLEUS = range(3)
RULES = {"greedy": GREEDY, "typical": TYPICAL, "nucleus": NUCLEUS}


@dataclass(frozen=True)
class AcceptRule:
    """How one sequence's tokens are chosen (the spec's acceptance rules)."""

    rule: int = GREEDY
    temperature: float = 0.0
    top_p: float = 1.0
    posterior_threshold: float = 0.09
    posterior_alpha: float = 0.3
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Only the likeliest token of a node is wanted."""
        return self.rule == GREEDY or self.temperature == 0


class Scores(Protocol):
    """What the model thinks comes after each node of a tree."""

    def best(self, node: int) -> int:
        """The likeliest token."""

    def logits(self, node: int) -> Tensor:
        """Float [vocab_size]."""


@dataclass(frozen=True)
class Accepted:
    """Nodes of the tree whose tokens stand (the root first), and the token that follows."""

    path: list[int]
    next_token: int


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def accept(
    scores: Scores, tokens: Sequence[int], parents: Sequence[int], position: int, rule: AcceptRule
) -> Accepted:
    """Judge one sequence's tree.

    Args:
        scores: asked only about nodes that matter.
        tokens: token of each node.
        parents: parent of each node; node 0 is the root, already certain.
        position: of the root in its sequence.
        rule: the sequence's acceptance rule.
    """
    children = children_of(parents)
    if rule.greedy:
        return _follow(scores, tokens, children)
    if rule.rule == NUCLEUS:
        return _sample_and_match(scores, tokens, children, position, rule)
    return _typical(scores, tokens, children, position, rule)


def _follow(scores: Scores, tokens: Sequence[int], children: list[list[int]]) -> Accepted:
    path = [0]
    while True:
        token = scores.best(path[-1])
        match = next((c for c in children[path[-1]] if tokens[c] == token), None)
        if match is None:
            return Accepted(path, token)
        path.append(match)


def _sample_and_match(
    scores: Scores,
    tokens: Sequence[int],
    children: list[list[int]],
    position: int,
    rule: AcceptRule,
) -> Accepted:
    """Draw from the model's own distribution at each node; go on while a child equals the draw.

    What is emitted are only ever the draws, so their distribution is exactly the model's.
    """
    path = [0]
    while True:
        node = path[-1]
        probs = _nucleus(_softmax(scores.logits(node), rule.temperature), rule.top_p)
        token = _draw(probs, uniform(rule.seed, position + len(path)))
        match = next((c for c in children[node] if tokens[c] == token), None)
        if match is None:
            return Accepted(path, token)
        path.append(match)


def _typical(
    scores: Scores,
    tokens: Sequence[int],
    children: list[list[int]],
    position: int,
    rule: AcceptRule,
) -> Accepted:
    """Accept p > min(threshold, alpha * exp(-H)) (Medusa, 2.3.1); longest path, then likeliest."""
    # Only nodes whose token stands are looked at: a large tree costs no more than a small one.
    judged: dict[int, tuple[Tensor, float]] = {}
    best: tuple[int, float, list[int]] = (1, 0.0, [0])
    open_paths = [best]
    while open_paths:
        length, score, path = open_paths.pop()
        best = max(best, (length, score, path), key=lambda found: found[:2])
        probs = _softmax(scores.logits(path[-1]), rule.temperature)
        bar = _typical_bar(probs, rule)
        judged[path[-1]] = probs, bar
        for child in children[path[-1]]:
            p = float(probs[tokens[child]])
            if p > bar:
                open_paths.append((length + 1, score + math.log(p), [*path, child]))
    path = best[2]
    probs, bar = judged[path[-1]]
    kept = torch.where(probs > bar, probs, 0.0)
    if not kept.any():
        return Accepted(path, int(probs.argmax()))
    return Accepted(path, _draw(kept, uniform(rule.seed, position + len(path))))


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    # float64: a draw must not depend on how a float32 sum was ordered.
    return torch.softmax(logits.double() / temperature, dim=-1)


def _typical_bar(probs: Tensor, rule: AcceptRule) -> float:
    entropy = -float((probs * probs.clamp_min(1e-20).log()).sum())
    return min(rule.posterior_threshold, rule.posterior_alpha * math.exp(-entropy))


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens that reach top_p together (Holtzman et al. 2020)."""
    if top_p >= 1.0:
        return probs
    ordered, index = probs.sort(descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = torch.zeros_like(probs)
    # The first is always kept, as nothing comes before it.
    kept[index] = torch.where(before < top_p, ordered, 0.0)
    return kept


def _draw(weights: Tensor, u: float) -> int:
    """The token at share u of the cumulative weights (inverse transform sampling)."""
    total = weights.cumsum(dim=-1)
    index = torch.searchsorted(total, u * total[-1], right=True)
    return int(index.clamp_max(len(weights) - 1))
