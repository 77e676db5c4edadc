"""Heads that see what was drafted before them ("hydra"): level by level, their products native."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.decoding.tree import ROOT_ONLY, Tree, with_chain
from engine.kernels.arena import Arena
from engine.kernels.native import Kernels, PackedLinear, pack
from engine.model.head_kinds import tokens_seen
from engine.model.medusa import MedusaLlamaForCausalLM, RootBlock, draft_along
from engine.model.quantize import QuantizedLinear


class SequentialHeads:
    """Drafts along a tree as the modules do, which give their weights away."""

    def __init__(
        self, model: MedusaLlamaForCausalLM, kernels: Kernels, lm_head: PackedLinear, arena: Arena
    ) -> None:
        self._model, self._kernels = model, kernels
        self._tied = self._output = lm_head
        self._width = model.heads.vocab_size or model.config.vocab_size
        packed: list[PackedLinear] = []
        if model.draft_head is not None:
            self._width = len(model.heads.token_map or ())
            self._output = pack_module(model.draft_head, arena)
            packed.append(self._output)
        self._blocks: list[list[dict[str, PackedLinear]]] = []
        for head in model.medusa_head:
            blocks = []
            for block in head:  # type: ignore[attr-defined]
                parts = {"output": block} if _is_linear(block) else dict(block.named_children())
                blocks.append(
                    {name: pack_module(m, arena) for name, m in parts.items() if _is_linear(m)}
                )
            packed += [w for parts in blocks for w in parts.values()]
            self._blocks.append(blocks)
        self.nbytes = sum(w.nbytes for w in packed)

    def draft(
        self, hidden: Tensor, roots: Tensor, k: int, count: int | None, tree: Tree | None
    ) -> Tensor:
        """As MedusaLlamaForCausalLM.draft."""
        tree = tree or with_chain(ROOT_ONLY, count or self._model.heads.num_heads)
        return draft_along(tree, roots, lambda head, known: self.guess(head, hidden, known, k))

    def guess(self, head: int, hidden: Tensor, known: Tensor, k: int) -> Tensor:
        """As MedusaLlamaForCausalLM.guess."""
        n, nodes, _ = known.shape
        rows = hidden[:, None].expand(n, nodes, -1).flatten(0, 1)
        run, width, x = self._kernels.linear, hidden.shape[1], rows
        for parts in self._blocks[head]:
            if "fc1" in parts:
                seen = known.flatten(0, 1)[:, : tokens_seen(self._model.heads.kind, head)]
                inner = F.silu(run(parts["fc1"], RootBlock.inputs(rows, self._embed(seen))))
                x = x + run(parts["fc2"], inner[:, : parts["fc2"].n_in])[..., :width]
            elif "linear" in parts:
                x = x + F.silu(run(parts["linear"], x)[..., :width])
            else:
                x = run(parts["output"], x)
        if self._model.heads.vocab_size is None:
            x = run(self._output, x)
        best = self._kernels.top(x, self._width, k)
        if (token_map := self._model.draft_tokens) is not None:
            best = token_map[best]
        return best.view(n, nodes, k)

    def _embed(self, tokens: Tensor) -> Tensor:
        model = self._model
        if hasattr(model, "root_embedding") or hasattr(model.model, "embed_tokens"):
            return model.embed_root(tokens)
        return self._tied.rows(tokens.flatten()).view(*tokens.shape, -1)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear)


def take_weights(module: nn.Module) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Weight, scale, bias and block of a quantized layer, which gives its weight away."""
    assert isinstance(module, QuantizedLinear)
    weight, module.weight = module.weight, torch.empty(0, dtype=torch.int8)
    return weight, module.scale, module.bias, module.block


def pack_module(module: nn.Module, arena: Arena) -> PackedLinear:
    """A quantized layer as the kernels read it."""
    return pack(*take_weights(module), arena=arena)
