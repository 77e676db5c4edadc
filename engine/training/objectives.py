"""What Medusa heads learn (Cai et al. 2024): Medusa-1, heads alone; Medusa-2, base and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from engine.model.medusa import MedusaLlamaForCausalLM
from engine.training.batch import Targets, make_targets
from engine.training.cross_entropy import cross_entropy
from engine.training.template import Sample
from engine.training.vocabulary import Vocabulary


class Objective:
    """The losses of a run: of the base (Medusa-2 only), then of each head.

    Head h (from 0) at row t predicts token t + h + 2; the base predicts t + 1. The loss of a step
    is the sum over the losses of their weight times their mean over all targets of the step.

    Args:
        weights: of the heads' losses; the base's counts 1.
        vocabulary: the tokens that the heads are held to; None for all. Targets outside are
            dropped and counted. The base's own loss is always over all tokens.
    """

    def __init__(
        self,
        kind: Literal["medusa1", "medusa2"],
        weights: Sequence[float],
        vocabulary: Vocabulary | None,
    ) -> None:
        self.has_base = kind == "medusa2"
        self.vocabulary = vocabulary
        self.weights = [1.0, *weights] if self.has_base else list(weights)
        self.distances = tuple(range(1 if self.has_base else 2, len(weights) + 2))
        """Tokens that each loss looks ahead."""
        self._frozen: Tensor | None = None
        """The heads' rows of an `lm_head` that never changes."""

    @property
    def first_head(self) -> int:
        """Index of head 0 among the losses."""
        return int(self.has_base)

    def targets(self, samples: Sequence[Sample], device: torch.device) -> Targets:
        """The targets of a micro-batch."""
        targets = make_targets(samples, self.distances, device)
        if self.vocabulary is None:
            return targets
        return self.vocabulary.restrict(targets, range(self.first_head, len(self.distances)))

    def scales(self, counts: Sequence[float]) -> list[float]:
        """How much each target counts, from the numbers of targets in the whole step."""
        return [weight / max(count, 1) for weight, count in zip(self.weights, counts, strict=True)]

    def loss(
        self,
        model: MedusaLlamaForCausalLM,
        hidden: Tensor,
        targets: Targets,
        scales: Sequence[float],
        *,
        base_learns: bool,
    ) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch; only the last stage can tell.

        Args:
            hidden: normed, of the rows `targets.positions`: [n, hidden_size].
            scales: as `scales` gives them.

        Returns:
            Its part of the step's loss, float32 [], and per loss the sum over its targets and
            the number predicted rightly, float64 [2, losses].
        """
        lm_head = model.lm_head.weight if base_learns else model.lm_head.weight.detach()
        total = hidden.new_zeros((), dtype=torch.float32)
        figures = []
        if self.has_base:
            part, figure = self._compare([hidden[targets.rows[0]]], lm_head, targets, scales, 0)
            total, figures = total + part, [figure]
        shared = model.heads.vocab_size is None
        inputs = []
        for head in range(model.heads.num_heads):
            rows = targets.rows[self.first_head + head]
            inputs.append(model.head_hidden(head, hidden[rows], targets.roots[rows]))
        if shared:
            weight = self._shared_weight(lm_head)
            part, figure = self._compare(inputs, weight, targets, scales, self.first_head)
            return total + part, torch.cat([*figures, figure], dim=1)
        for head, module in enumerate(model.medusa_head):
            weight = module[-1].weight  # type: ignore[index]
            index = self.first_head + head
            part, figure = self._compare([inputs[head]], weight, targets, scales, index)
            total, figures = total + part, [*figures, figure]
        return total, torch.cat(figures, dim=1)

    def _shared_weight(self, lm_head: Tensor) -> Tensor:
        """The rows of `lm_head` that the heads are held to."""
        if self.vocabulary is None:
            return lm_head
        if self.has_base:
            return lm_head[self.vocabulary.ids]
        if self._frozen is None:
            self._frozen = lm_head[self.vocabulary.ids]
        return self._frozen

    @staticmethod
    def _compare(
        inputs: Sequence[Tensor],
        weight: Tensor,
        targets: Targets,
        scales: Sequence[float],
        first: int,
    ) -> tuple[Tensor, Tensor]:
        """As `loss`, of the losses from `first` on that have these inputs and share `weight`."""
        span = range(first, first + len(inputs))
        sizes = [len(part) for part in inputs]
        row_scales = torch.cat(
            [torch.full((n,), scales[i]) for n, i in zip(sizes, span, strict=True)]
        ).to(weight.device)
        tokens = torch.cat([targets.tokens[i] for i in span])
        total, losses, right = cross_entropy(torch.cat(list(inputs)), weight, tokens, row_scales)
        sums = [
            torch.stack([part.double().sum(), hits.double().sum()])
            for part, hits in zip(losses.split(sizes), right.split(sizes), strict=True)
        ]
        return total, torch.stack(sums, dim=1)
