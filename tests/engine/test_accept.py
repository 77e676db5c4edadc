"""Acceptance rules: what stands of a drafted tree."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from engine.decoding.accept import GREEDY, NUCLEUS, TYPICAL, AcceptRule, accept, uniform

# 0 ── 1 ── 3
#  └── 2 ── 4
PARENTS = [-1, 0, 0, 1, 2]
TOKENS = [5, 1, 2, 3, 3]


class Given:
    """Scores from logits [nodes, vocab_size]."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.rows = logits

    def best(self, node: int) -> int:
        return int(self.rows[node].argmax())

    def logits(self, node: int) -> torch.Tensor:
        return self.rows[node]


def logits_of(rows: list[list[float]]) -> torch.Tensor:
    """Logits whose softmax is exactly these probabilities."""
    return torch.tensor(rows).clamp_min(1e-9).log()


def test_greedy_follows_the_argmax_and_stops_at_the_first_miss() -> None:
    best = [2, 0, 3, 0, 4]
    logits = torch.nn.functional.one_hot(torch.tensor(best), 6).float()
    found = accept(Given(logits), TOKENS, PARENTS, 10, AcceptRule())
    assert found.path == [0, 2, 4]
    assert found.next_token == 4
    logits[0] = torch.tensor([9.0, 0, 0, 0, 0, 0])
    assert accept(Given(logits), TOKENS, PARENTS, 10, AcceptRule()).path == [0]


def test_temperature_zero_is_greedy_under_every_rule() -> None:
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    expected = accept(Given(logits), TOKENS, PARENTS, 10, AcceptRule(GREEDY))
    for rule in (TYPICAL, NUCLEUS):
        assert (
            accept(Given(logits), TOKENS, PARENTS, 10, AcceptRule(rule, temperature=0.0))
            == expected
        )


def test_typical_takes_the_longest_path_above_the_bar() -> None:
    flat = [1 / 6] * 6
    rows = [[0.0, 0.55, 0.45, 0.0, 0.0, 0.0], flat, [0.1, 0.0, 0.0, 0.9, 0.0, 0.0], flat, flat]
    rows[1] = [0.98, 0.0, 0.0, 0.02, 0.0, 0.0]  # node 3 would come after node 1: too unlikely
    rule = AcceptRule(TYPICAL, temperature=1.0, posterior_threshold=0.09, posterior_alpha=0.3)
    assert accept(Given(logits_of(rows)), TOKENS, PARENTS, 10, rule).path == [0, 2, 4]


def test_typical_prefers_the_likelier_of_two_equally_long_paths() -> None:
    rows = [[0.0, 0.45, 0.55, 0, 0, 0], *[[0.2, 0.2, 0.2, 0.0, 0.2, 0.2]] * 4]
    rule = AcceptRule(TYPICAL, temperature=1.0)
    assert accept(Given(logits_of(rows)), TOKENS, PARENTS, 10, rule).path == [0, 2]


def test_typical_bar_is_the_lower_of_threshold_and_scaled_entropy() -> None:
    peaked = [0.96, 0.04, 0.0, 0.0, 0.0, 0.0]
    entropy = -(0.96 * math.log(0.96) + 0.04 * math.log(0.04))
    assert 0.3 * math.exp(-entropy) > 0.09 > 0.04
    rows = [peaked, *[[1 / 6] * 6] * 4]
    strict = AcceptRule(TYPICAL, temperature=1.0)
    assert accept(Given(logits_of(rows)), TOKENS, PARENTS, 10, strict).path == [0]
    loose = AcceptRule(TYPICAL, temperature=1.0, posterior_threshold=0.03)
    assert accept(Given(logits_of(rows)), TOKENS, PARENTS, 10, loose).path == [0, 1, 3]


def test_nucleus_never_draws_outside_top_p() -> None:
    logits = logits_of([[0.5, 0.3, 0.15, 0.05]])
    drawn = {
        accept(Given(logits), [0], [-1], at, AcceptRule(NUCLEUS, 1.0, top_p=0.6)).next_token
        for at in range(500)
    }
    assert drawn == {0, 1}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_sample_and_match_draws_from_the_models_own_distribution(
    temperature: float, top_p: float
) -> None:
    """Sequences drawn through random trees are distributed as those drawn token by token."""
    vocab, length, trials = 4, 3, 4000
    table = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(3))
    probs = torch.softmax(table.double() / temperature, -1)
    ordered, index = probs.sort(-1, descending=True)
    cut = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
    probs = torch.zeros_like(probs).scatter(-1, index, cut / cut.sum(-1, keepdim=True))
    counts: Counter[tuple[int, ...]] = Counter()
    lengths = 0
    for trial in range(trials):
        drawn = [0]
        drafts = random.Random(trial)
        rule = AcceptRule(NUCLEUS, temperature, top_p, seed=trial)
        while len(drawn) <= length:
            tokens = [drawn[-1], *drafts.sample(range(vocab), 2), drafts.randrange(vocab)]
            found = accept(Given(table[tokens]), tokens, [-1, 0, 0, 1], len(drawn) - 1, rule)
            drawn += [tokens[node] for node in found.path[1:]] + [found.next_token]
            lengths += len(found.path) > 1
        counts[tuple(drawn[1 : length + 1])] += 1
    expected = {
        (a, b, c): float(probs[0, a] * probs[a, b] * probs[b, c]) * trials
        for a in range(vocab)
        for b in range(vocab)
        for c in range(vocab)
    }
    possible = {key: value for key, value in expected.items() if value > 0}
    assert set(counts) <= set(possible)
    assert lengths > trials / 2  # the drafts were accepted often enough to matter
    assert chisquare([counts[k] for k in possible], list(possible.values())).pvalue > 0.001


def test_a_seeded_draw_depends_on_seed_and_position_only() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    rule = AcceptRule(NUCLEUS, 1.0, seed=7)
    drawn = [accept(Given(logits), [0], [-1], at, rule).next_token for at in range(20)]
    again = [accept(Given(logits), [0], [-1], at, rule).next_token for at in reversed(range(20))]
    assert drawn == again[::-1]
    assert len(set(drawn)) > 5
    values = [uniform(seed, at) for seed in range(50) for at in range(50)]
    assert all(0 <= value < 1 for value in values)
    assert chisquare([sum(int(v * 10) == b for v in values) for b in range(10)]).pvalue > 0.001
