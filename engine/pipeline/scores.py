"""What the model thinks of the nodes of a tree, computed no sooner than needed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from engine.pipeline.batch import Entry, Judge
from engine.pipeline.forward import Forward

CHAIN = 3
"""Nodes that are looked at in any case: the root and the likeliest line below it."""


class NodeScores:
    """Of one judged entry, by its nodes; see engine.decoding.accept.Scores.

    `lm_head` is among the largest products of a step, and most nodes of a tree are not on the path
    that stands.
    """

    def __init__(self, forward: Forward, entry: Entry, hidden: Tensor) -> None:
        """`hidden`: normed, [rows of the entry, hidden_size]."""
        alone = entry.judge is Judge.LAST
        self.entry = entry
        self.tokens = entry.tokens[-1:] if alone else entry.tokens
        self.parents = [-1] if alone else entry.parents
        self.position = entry.start + len(entry.tokens) - len(self.tokens)
        self.hidden = hidden if len(hidden) == len(self.tokens) else hidden[-len(self.tokens) :]
        self._forward = forward
        self.best_tokens: dict[int, int] = {}
        self.node_logits: dict[int, Tensor] = {}

    def best(self, node: int) -> int:
        """The likeliest token after a node."""
        if node not in self.best_tokens:
            (self.best_tokens[node],) = self._forward.best(self.hidden[node : node + 1])
        return self.best_tokens[node]

    def logits(self, node: int) -> Tensor:
        """float32 [vocab_size]."""
        if node not in self.node_logits:
            (self.node_logits[node],) = self._forward.logits(self.hidden[node : node + 1])
        return self.node_logits[node]

    @cached_property
    def first_nodes(self) -> list[int]:
        """Those that are sure or likely to be asked for."""
        if not self._forward.by_row:
            return list(range(len(self.tokens)))
        line = [0]
        while len(line) < CHAIN and line[-1] in self.parents:
            line.append(self.parents.index(line[-1]))
        return line

    def first_rows(self) -> Tensor:
        """Hidden states of the first nodes."""
        nodes = self.first_nodes
        return self.hidden if len(nodes) == len(self.tokens) else self.hidden[nodes]


def look_ahead(forward: Forward, scores: Sequence[NodeScores]) -> None:
    """Compute what all entries are likely to ask for: one product for each kind of them."""
    greedy = [each for each in scores if each.entry.rule.greedy]
    others = [each for each in scores if not each.entry.rule.greedy]
    if greedy:
        best = iter(forward.best(torch.cat([each.first_rows() for each in greedy])))
        for each in greedy:
            each.best_tokens.update(zip(each.first_nodes, best, strict=False))
    if others:
        logits = iter(forward.logits(torch.cat([each.first_rows() for each in others])))
        for each in others:
            each.node_logits.update(zip(each.first_nodes, logits, strict=False))
