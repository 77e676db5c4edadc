"""Cross entropy over a large vocabulary without its logits ever being there as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.training.mesh import Group

CHUNK_LOGITS = 1 << 24
"""Logits of one chunk of rows: 64 MB in float32."""


@dataclass(frozen=True)
class Guesses:
    """Distributions that are a part of what rows should give, beside their targets."""

    table: Tensor
    """float32 [m, vocab], each row a distribution."""
    at: Tensor
    """int64 [n]: the one of each row."""
    share: float
    """Its part in what a row should give; the rest is the target."""


@dataclass(frozen=True)
class SharedVocabulary:
    """Ranks that have some rows of an output layer each."""

    group: Group
    first: int
    """This rank's first row."""
    most: int
    """Rows of the rank that has most."""


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scales: Tensor,
    guesses: Guesses | None = None,
    shared: SharedVocabulary | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of `hidden @ weight.T` against `targets`, in chunks of rows.

    The gradients are computed along with the loss, so the logits of a chunk are needed only once
    and backward costs next to nothing.

    Args:
        hidden: [n, width]; weight: [vocab, width]; targets: int64 [n], rows of `weight`.
        scales: float32 [n], how much each row counts in the sum.
        guesses: what rows should give besides their targets; then the loss is against both, mixed.
        shared: where several ranks have the same `hidden` and each some rows of `weight`; all
            get the same results, and each the gradient of its rows. Not with `guesses`.

    Returns:
        The scaled sum, float32 [], with a gradient for `hidden` and `weight` where they want one;
        the loss of each row, float32 [n]; and whether its likeliest token was the target,
        bool [n].
    """
    total, losses, right = _CrossEntropy.apply(
        hidden, weight, targets, scales, guesses, shared, torch.is_grad_enabled()
    )
    return total, losses, right


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scales: Tensor,
        guesses: Guesses | None,
        shared: SharedVocabulary | None,
        grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = (grad and ctx.needs_input_grad[i] for i in (0, 1))
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        right = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # once, not once a chunk
            weight = weight.to(torch.get_autocast_dtype(device))
        most = len(weight) if shared is None else shared.most  # the same chunks on all ranks
        for at in range(0, len(hidden), step := max(1, CHUNK_LOGITS // most)):
            rows = slice(at, at + step)
            part, target, absent = hidden[rows], targets[rows, None], None
            logits = (part.to(weight.dtype) @ weight.T).float()
            if shared is not None:
                target = target - shared.first
                absent = (target < 0) | (target >= len(weight))
                target = target.masked_fill(absent, 0)
            best, index = logits.max(-1, keepdim=True)
            wanted = logits.gather(1, target)
            hits = index == target
            if guesses is not None:
                soft, share = guesses.table[guesses.at[rows]], guesses.share
                wanted.mul_(1 - share).add_((soft * logits).sum(-1, keepdim=True), alpha=share)
            if shared is not None:
                own, best = best, shared.group.max_(best.clone())
                hits &= own == best
            logits.sub_(best).exp_()
            sums = logits.sum(-1, keepdim=True)
            if shared is not None and absent is not None:
                mine = torch.cat((wanted, hits), 1).masked_fill(absent, 0.0)
                sums, wanted, hits = shared.group.sum_(torch.cat((sums, mine), 1)).split(1, 1)
            losses[rows] = (sums.log() + best - wanted)[:, 0]
            right[rows] = hits[:, 0] > 0
            if grad_hidden is None and grad_weight is None:
                continue
            # Softmax less what is wanted, times the row's scale.
            scale = scales[rows, None]
            slope = logits.mul_(scale / sums)
            if guesses is None:
                less = -scale if absent is None else (-scale).masked_fill(absent, 0.0)
                slope.scatter_add_(1, target, less)
            else:
                slope.scatter_add_(1, target, (share - 1) * scale)
                slope.sub_(soft.mul_(share * scale))
            if grad_hidden is not None:
                grad_hidden[rows] = slope.to(weight.dtype) @ weight
            if grad_weight is not None:
                grad_weight += slope.to(part.dtype).T @ part
        if grad_hidden is not None and shared is not None:
            shared.group.sum_(grad_hidden)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses, right)
        return (losses * scales).sum(), losses, right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by = grads[0]
        hidden, weight = ctx.saved_tensors
        return (
            None if hidden is None else hidden * by,
            None if weight is None else weight * by.to(weight.dtype),
            *[None] * 5,
        )
