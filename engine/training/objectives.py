"""What is learnt: by the base alone (`sft`, `pt`), or as in Medusa (Cai et al. 2024) by heads alone
(Medusa-1) or by both (Medusa-2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from engine.model.medusa import MedusaLlamaForCausalLM
from engine.training.batch import Sharing, Targets, make_targets
from engine.training.cross_entropy import Guesses, SharedVocabulary, cross_entropy
from engine.training.template import Sample
from engine.training.vocabulary import Vocabulary

ObjectiveKind = Literal["medusa1", "medusa2", "sft", "pt"]


class Objective:
    """The losses of a run: of the base (not with Medusa-1), then of each head, if there are any.

    Head h (from 0) at row t predicts token t + h + 2; the base predicts t + 1. The loss of a step
    is the sum over the losses of their weight times their mean over all targets of the step.

    Args:
        weights: of the heads' losses; the base's counts 1.
        vocabulary: the tokens that the heads are held to; None for all. Targets outside are
            dropped and counted. The base's own loss is always over all tokens.
        soft: share of the frozen base's own distribution in what the heads should give; the rest
            is the token itself.
        sharing: how ranks share the rows of a micro-batch; shared: and those of `lm_head`.
    """

    def __init__(
        self,
        kind: ObjectiveKind,
        weights: Sequence[float],
        vocabulary: Vocabulary | None,
        sharing: Sharing | None = None,
        shared: SharedVocabulary | None = None,
        *,
        soft: float = 0.0,
    ) -> None:
        self.has_base = kind != "medusa1"
        self.vocabulary = vocabulary
        self.sharing, self.shared = sharing, shared
        self.weights = [1.0, *weights] if self.has_base else list(weights)
        self.distances = tuple(range(1 if self.has_base else 2, len(weights) + 2))
        """Tokens that each loss looks ahead."""
        self.soft = soft
        self.looks = (1, *self.distances) if soft else self.distances
        """As `distances`, and that of the base's rows that the heads learn from."""
        self.has_heads = bool(weights)
        self._frozen: Tensor | None = None
        """The heads' rows of an `lm_head` that never changes."""

    @property
    def first_head(self) -> int:
        """Index of head 0 among the losses."""
        return int(self.has_base)

    def targets(self, samples: Sequence[Sample], device: torch.device) -> Targets:
        """The targets of a micro-batch."""
        targets = make_targets(samples, self.distances, device, self.sharing, taught=self.soft > 0)
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
        shared = model.heads.vocab_size is None
        total = hidden.new_zeros((), dtype=torch.float32)
        figures = []
        if self.has_base:
            inputs = [hidden[targets.rows[0]]]
            part, figure = self._compare(inputs, lm_head, targets, scales, 0, None)
            total, figures = total + part, [figure]
        if not model.heads.num_heads:
            return total, torch.cat(figures, dim=1)
        shared_weight = lm_head
        if shared or self.soft:
            shared_weight = self._shared_weight(lm_head)
        soft = self._own_guesses(hidden, shared_weight)
        inputs = []
        for head in range(model.heads.num_heads):
            rows = targets.rows[self.first_head + head]
            inputs.append(model.head_hidden(head, hidden[rows], targets.known[rows]))
        if shared:
            part, figure = self._compare(
                inputs, shared_weight, targets, scales, self.first_head, soft
            )
            return total + part, torch.cat([*figures, figure], dim=1)
        for head, module in enumerate(model.medusa_head):
            weight = module[-1].weight  # type: ignore[index]
            index = self.first_head + head
            part, figure = self._compare([inputs[head]], weight, targets, scales, index, soft)
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

    @torch.no_grad()
    def _own_guesses(self, hidden: Tensor, weight: Tensor) -> Tensor | None:
        """The base's distribution over the heads' tokens at every row, float32 [n, tokens]."""
        return (hidden @ weight.T).float().softmax(-1) if self.soft else None

    def _compare(
        self,
        inputs: Sequence[Tensor],
        weight: Tensor,
        targets: Targets,
        scales: Sequence[float],
        first: int,
        soft: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """As `loss`, of the losses from `first` on that have these inputs and share `weight`."""
        span = range(first, first + len(inputs))
        sizes = [len(part) for part in inputs]
        row_scales = torch.cat(
            [torch.full((n,), scales[i]) for n, i in zip(sizes, span, strict=True)]
        ).to(weight.device)
        tokens = torch.cat([targets.tokens[i] for i in span])
        if soft is None:
            guesses = None
        else:
            guesses = Guesses(soft, torch.cat([targets.teachers[i] for i in span]), self.soft)
        total, losses, right = cross_entropy(
            torch.cat(list(inputs)), weight, tokens, row_scales, guesses, self.shared
        )
        sums = [
            torch.stack([part.double().sum(), hits.double().sum()])
            for part, hits in zip(losses.split(sizes), right.split(sizes), strict=True)
        ]
        return total, torch.stack(sums, dim=1)
