"""What computes in a stage: the modules themselves, or compiled kernels in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from engine.decoding.tree import Tree
from engine.model.kv_cache import KVStore
from engine.model.medusa import MedusaLlamaForCausalLM
from engine.pipeline.batch import Entry, Result, attention_rows

if TYPE_CHECKING:
    from engine.pipeline.scores import NodeScores


class Forward(Protocol):
    """The computing of one stage; rows are those of the entries, one under the other."""

    by_row: bool
    """A row costs the same alone as beside others, or nearly, and comes to the same bits: logits of
    rows that may not be needed are better asked for later."""
    threads: int
    """CPU threads that it computes with as long as nobody says otherwise."""

    def use_threads(self, threads: int) -> None:
        """Compute with fewer threads, or with all again."""

    @property
    def packed_bytes(self) -> int:
        """Of weights that are not among the model's tensors."""

    @property
    def progress(self) -> int:
        """Layers computed so far; another thread may look."""

    def layers(self, x: Tensor | Sequence[int], entries: Sequence[Entry], store: KVStore) -> Tensor:
        """Tokens [rows] on the first stage, else hidden states, to hidden states.

        The rows that entries keep are moved before. On the last stage hidden states are normed,
        [rows, hidden_size].
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [rows, vocab_size] of normed hidden states."""

    def best(self, hidden: Tensor) -> list[int]:
        """The likeliest token of each row of normed hidden states."""

    def draft(
        self,
        hidden: Tensor,
        roots: Tensor,
        k: int,
        heads: int | None = None,
        tree: Tree | None = None,
    ) -> Tensor:
        """As MedusaLlamaForCausalLM.draft."""

    def guess(self, head: int, hidden: Tensor, known: Tensor, k: int) -> Tensor:
        """As MedusaLlamaForCausalLM.guess."""

    def judge_greedy(
        self, trees: Sequence[NodeScores], k: int, heads: int | None, along: Tree | None
    ) -> list[Result] | None:
        """Greedy results of some trees with `k` candidates of each of the first `heads` heads,
        sequential ones along a tree.

        Without candidates where `k` is 0, or where drafting is a call of its own; None where this
        is to be done piece by piece.
        """


class ModuleForward:
    """The stage's modules as they are."""

    by_row = False
    packed_bytes = 0

    def __init__(
        self, model: MedusaLlamaForCausalLM, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model, self._dtype, self._device = model, dtype, device
        self.threads = torch.get_num_threads()
        self.progress = 0
        for layer in model.model.layers:
            layer.register_forward_hook(self._count)

    def use_threads(self, threads: int) -> None:
        """See Forward."""
        torch.set_num_threads(threads)

    def _count(self, *_: object) -> None:
        self.progress += 1

    @torch.inference_mode()
    def layers(self, x: Tensor | Sequence[int], entries: Sequence[Entry], store: KVStore) -> Tensor:
        """See Forward."""
        for entry in entries:
            cache, slot = store.find(entry.slot)
            cache.move(slot, entry.keep, entry.keep_to)
        if not isinstance(x, Tensor):
            x = torch.tensor(x, device=self._device)
        config = self._model.config
        rows = attention_rows(
            entries,
            store,
            groups=config.num_attention_heads // config.num_key_value_heads,
            dtype=self._dtype,
            device=self._device,
        )
        return self._model(x, rows)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See Forward."""
        return self._model.lm_head(hidden).float()

    @torch.inference_mode()
    def best(self, hidden: Tensor) -> list[int]:
        """See Forward."""
        return self._model.lm_head(hidden).argmax(dim=-1).tolist()

    @torch.inference_mode()
    def draft(
        self,
        hidden: Tensor,
        roots: Tensor,
        k: int,
        heads: int | None = None,
        tree: Tree | None = None,
    ) -> Tensor:
        """See Forward."""
        return self._model.draft(hidden, roots, k, heads, tree)

    @torch.inference_mode()
    def guess(self, head: int, hidden: Tensor, known: Tensor, k: int) -> Tensor:
        """See Forward."""
        return self._model.guess(head, hidden, known, k)

    def judge_greedy(
        self, trees: Sequence[NodeScores], k: int, heads: int | None, along: Tree | None
    ) -> list[Result] | None:
        """See Forward."""
        return None
