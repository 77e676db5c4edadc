"""Which row is compared with which token, and how the losses are weighed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.model.config import ModelConfig
from engine.model.medusa import HeadShape, MedusaLlamaForCausalLM
from engine.training.batch import make_batch, make_targets
from engine.training.objectives import Objective
from engine.training.template import Sample
from engine.training.vocabulary import Vocabulary, most_frequent
from tests.tiny import reference

CPU = torch.device("cpu")


def sample(tokens: list[int], counted: str) -> Sample:
    """`counted` has an x for each token that counts."""
    return Sample(np.array(tokens), np.array([mark == "x" for mark in counted]))


# Tokens 10.. of a prompt of three and an answer of three; then a short one.
SAMPLES = [sample([10, 11, 12, 13, 14, 15], "...xxx"), sample([20, 21, 22], ".xx")]


def pairs(objective: Objective, samples: list[Sample]) -> list[list[tuple[int, int]]]:
    """Per loss, (row of the micro-batch, token it should predict)."""
    targets = objective.targets(samples, CPU)
    return [
        list(zip(targets.positions[rows].tolist(), tokens.tolist(), strict=True))
        for rows, tokens in zip(targets.rows, targets.tokens, strict=True)
    ]


def test_head_h_predicts_the_token_h_plus_2_ahead_where_it_counts() -> None:
    heads = pairs(Objective("medusa1", [1.0, 1.0, 1.0], None), SAMPLES)
    assert heads == [
        [(1, 13), (2, 14), (3, 15), (6, 22)],
        [(0, 13), (1, 14), (2, 15)],
        [(0, 14), (1, 15)],
    ]


def test_soft_targets_are_the_bases_own_guesses_of_the_same_tokens() -> None:
    targets = Objective("medusa1", [1.0, 1.0], None, soft=0.5).targets(SAMPLES, CPU)
    for rows, teachers, distance in zip(targets.rows, targets.teachers, (2, 3), strict=True):
        ahead = targets.positions[teachers] - targets.positions[rows]
        assert ahead.tolist() == [distance - 1] * len(rows)


def test_medusa_2_adds_the_bases_own_loss() -> None:
    losses = pairs(Objective("medusa2", [1.0], None), SAMPLES)
    assert losses[0] == [(2, 13), (3, 14), (4, 15), (6, 21), (7, 22)]
    assert losses[1] == [(1, 13), (2, 14), (3, 15), (6, 22)]


def test_only_rows_that_some_loss_needs_are_picked() -> None:
    targets = make_targets(SAMPLES, (2, 3), CPU)
    assert targets.positions.tolist() == [0, 1, 2, 3, 6]


def test_a_sample_too_short_for_a_head_is_no_target() -> None:
    targets = make_targets([sample([1, 2], ".x")], (2, 3), CPU)
    assert targets.counts() == [0, 0]
    assert targets.positions.tolist() == []


def test_samples_lie_under_one_another_and_attend_to_themselves() -> None:
    batch = make_batch(SAMPLES, CPU)
    rows = batch.rows
    assert batch.tokens.tolist() == [10, 11, 12, 13, 14, 15, 20, 21, 22]
    assert rows.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert [segment.rows for segment in rows.segments] == [slice(0, 6), slice(6, 9)]


def test_targets_outside_the_vocabulary_are_dropped_and_counted() -> None:
    vocabulary = Vocabulary(torch.tensor([13, 15, 21]), 30)
    targets = Objective("medusa2", [1.0, 1.0], vocabulary).targets(SAMPLES, CPU)
    assert targets.tokens[0].tolist() == [13, 14, 15, 21, 22]  # the base's: all of them
    assert targets.tokens[1].tolist() == [0, 1]  # tokens 13 and 15, as rows
    assert targets.tokens[2].tolist() == [0, 1]
    assert targets.dropped == [0, 2, 1]


def test_the_vocabulary_is_what_the_answers_use_most() -> None:
    samples = [sample([7, 7, 7, 5, 5, 3, 9], "...xxxx"), sample([9, 2], ".x")]
    assert most_frequent(samples, 12, 1).tolist() == [5]
    # 2, 3 and 9 are equally frequent: lower ids go first; prompts do not count.
    assert most_frequent(samples, 12, 3).tolist() == [2, 3, 5]
    assert most_frequent(samples, 12, 6).tolist() == [0, 1, 2, 3, 5, 9]


def test_each_loss_is_a_mean_over_its_own_targets() -> None:
    objective = Objective("medusa2", [0.8, 0.5], None)
    assert objective.scales([10, 8, 0]) == [0.1, pytest.approx(0.1), 0.5]


@pytest.mark.parametrize("kind", ["medusa1", "medusa2"])
def test_a_restricted_loss_follows_an_lm_head_that_learns(kind: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig.from_dict(
        {**reference("qwen2", layers=1).config.to_dict(), "architectures": ["Qwen2ForCausalLM"]}
    )
    model = MedusaLlamaForCausalLM(config, HeadShape(1))
    objective = Objective(kind, [1.0], Vocabulary(torch.tensor([13, 14, 15, 22]), 260))  # type: ignore[arg-type]
    targets = objective.targets(SAMPLES, CPU)
    hidden = torch.randn(len(targets.positions), config.hidden_size)

    def loss() -> float:
        total, _ = objective.loss(model, hidden, targets, [1.0, 1.0], base_learns=False)
        return total.item()

    before = loss()
    torch.nn.init.zeros_(model.lm_head.weight)
    learnt = kind == "medusa2"  # with medusa1 it never changes, so its rows are gathered once
    assert (loss() == pytest.approx(before)) != learnt
