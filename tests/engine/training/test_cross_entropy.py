"""The chunked cross entropy against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from engine.training import cross_entropy as module
from engine.training.cross_entropy import Guesses, cross_entropy

VOCAB, WIDTH, ROWS = 37, 8, 11


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_losses_and_gradients_equal_torchs(
    chunk_rows: int, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk_rows * VOCAB)
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    targets, scales = torch.randint(VOCAB, (ROWS,)), torch.rand(ROWS)
    table, at = torch.randn(5, VOCAB).softmax(-1), torch.randint(5, (ROWS,))
    guesses = None if share is None else Guesses(table, at, share)
    total, losses, right = cross_entropy(hidden, weight, targets, scales, guesses)
    (3 * total).backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    logits = hidden @ weight.T
    wanted = F.one_hot(targets, VOCAB).float()
    if share is not None:
        wanted = (1 - share) * wanted + share * table[at]
    expected = F.cross_entropy(logits, wanted, reduction="none")
    (3 * (expected * scales).sum()).backward()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(total, (expected * scales).sum())
    torch.testing.assert_close(found, (hidden.grad, weight.grad))
    assert right.equal(logits.argmax(-1) == targets)


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden = torch.randn(3, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH)
    total, _, _ = cross_entropy(hidden, weight, torch.tensor([1, 2, 3]), torch.ones(3))
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_rows_are_no_loss() -> None:
    hidden = torch.randn(0, WIDTH, requires_grad=True)
    none = torch.tensor([], dtype=torch.int64)
    total, losses, _ = cross_entropy(hidden, torch.randn(VOCAB, WIDTH), none, torch.ones(0))
    total.backward()
    assert total == 0
    assert len(losses) == 0


def test_large_logits_stay_finite() -> None:
    hidden, weight = torch.full((1, 1), 300.0), torch.tensor([[1.0], [-1.0]])
    _, losses, _ = cross_entropy(hidden, weight, torch.tensor([1]), torch.ones(1))
    assert losses.item() == pytest.approx(600.0)
