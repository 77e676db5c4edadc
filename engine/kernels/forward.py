"""A stage's forward on the compiled kernels: the same results as the modules, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from engine.decoding.tree import ROOT_ONLY, Tree, depths_of, with_chain
from engine.kernels.build import NoKernelsError
from engine.kernels.native import (
    COLS,
    PAIR,
    ROW,
    Kernels,
    NativeLayers,
    PackedLayer,
    PackedLinear,
    interleave,
    pack,
)
from engine.model.config import ModelConfig
from engine.model.head_kinds import tokens_seen
from engine.model.kv_cache import KVStore
from engine.model.llama import LlamaDecoderLayer
from engine.model.medusa import HeadShape, MedusaLlamaForCausalLM, RootBlock, draft_along
from engine.model.quantize import QuantizedLinear
from engine.pipeline.batch import Entry

LINEARS = (nn.Linear, QuantizedLinear)
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
"""Sizes that `attend_any` of layers.cpp is compiled for."""


class NativeForward:
    """Runs the layers, `lm_head` and heads of a quantized stage on a CPU.

    A row's values do not depend on the rows beside it, so greedy answers are the same with any
    tree, split and batch. The modules give their quantized weights away.

    Raises NoKernelsError where the kernels cannot be had.
    """

    by_row = True

    def __init__(self, model: MedusaLlamaForCausalLM, threads: int) -> None:
        config = model.config
        if problem := _problem(config, model.heads):
            raise NoKernelsError(problem)
        self._model, self._kernels, self.threads = model, Kernels(threads), threads
        layers = [_pack_layer(layer) for layer in model.model.layers]  # type: ignore[arg-type]
        self._layers = NativeLayers(
            self._kernels,
            layers,
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
        )
        self._half = config.head_dim // 2
        self.packed_bytes = sum(layer.nbytes for layer in layers)
        if hasattr(model, "lm_head"):
            self._lm_head = _pack(model.lm_head)
            self._heads = _Heads(model, self._kernels, self._lm_head)
            self.packed_bytes += self._lm_head.nbytes + self._heads.nbytes

    @property
    def progress(self) -> int:
        """See Forward."""
        return self._kernels.progress

    def layers(self, x: Tensor, entries: Sequence[Entry], store: KVStore) -> Tensor:
        """As MedusaLlamaForCausalLM.forward: tokens int64 [rows] or hidden states, to hidden."""
        model = self._model
        x = model.model.embed_tokens(x) if hasattr(model.model, "embed_tokens") else x.clone()
        rows, seen, positions = _row_table(entries, store)
        cosine, sine = model.model.rotary_emb(torch.from_numpy(positions), torch.float32)
        cosine = cosine[:, 0, : self._half].contiguous()
        sine = sine[:, 0, : self._half].contiguous()
        self._layers.run(x, cosine, sine, rows, seen)
        if not hasattr(model.model, "norm"):
            return x
        return self._kernels.norm(x, model.model.norm.weight, model.config.rms_norm_eps)

    def use_threads(self, threads: int) -> None:
        """See Forward."""
        self._kernels.use(threads)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [rows, vocab_size] of normed hidden states."""
        out = self._kernels.linear(self._lm_head, hidden)
        return out[:, : self._model.config.vocab_size]

    def best(self, hidden: Tensor) -> list[int]:
        """See Forward; the logits themselves are never stored."""
        return self._kernels.best(self._lm_head, hidden, self._model.config.vocab_size)

    def draft(
        self,
        hidden: Tensor,
        roots: Tensor,
        k: int,
        heads: int | None = None,
        tree: Tree | None = None,
    ) -> Tensor:
        """As MedusaLlamaForCausalLM.draft."""
        return self._heads.draft(hidden, roots, k, heads, tree)

    def guess(self, head: int, hidden: Tensor, known: Tensor, k: int) -> Tensor:
        """As MedusaLlamaForCausalLM.guess."""
        return self._heads.guess(head, hidden, known, k)


class _Heads:
    """The Medusa heads; products at the same depth of all heads are one call."""

    def __init__(
        self, model: MedusaLlamaForCausalLM, kernels: Kernels, lm_head: PackedLinear
    ) -> None:
        self._model, self._kernels = model, kernels
        self._tied = self._lm_head = lm_head
        self._width = model.heads.vocab_size or model.config.vocab_size
        self.nbytes = 0
        if model.draft_head is not None:
            self._width = len(model.heads.token_map or ())
            self._lm_head = _pack(model.draft_head)
            self.nbytes += self._lm_head.nbytes
        self._packed: list[dict[str, list[PackedLinear]]] = []
        for blocks in zip(*model.medusa_head, strict=True) if model.heads.num_heads else ():
            if _is_linear(blocks[0]):
                self._packed.append({"output": [_pack(block) for block in blocks]})
                continue
            names = [name for name, child in blocks[0].named_children() if _is_linear(child)]
            self._packed.append(
                {name: [_pack(getattr(block, name)) for block in blocks] for name in names}
            )
        lists = [each for parts in self._packed for each in parts.values()]
        self.nbytes += sum(packed.nbytes for each in lists for packed in each)

    def draft(
        self, hidden: Tensor, roots: Tensor, k: int, count: int | None, tree: Tree | None
    ) -> Tensor:
        model, heads, run = self._model, self._model.heads, self._kernels.linears
        if heads.kind == "hydra":
            tree = tree or with_chain(ROOT_ONLY, count or heads.num_heads)
            return draft_along(tree, roots, lambda head, known: self.guess(head, hidden, known, k))
        width = hidden.shape[1]
        n = heads.num_heads if count is None else min(count, heads.num_heads)
        x = hidden.expand(n, *hidden.shape)
        for parts in self._packed:
            if "fc1" in parts:
                both = RootBlock.inputs(hidden, self._embed(roots[:, None]))
                inner = F.silu(run(parts["fc1"][:n], both.expand(n, *both.shape)))
                x = x + run(parts["fc2"][:n], inner)[..., :width]
            elif "linear" in parts:
                x = x + F.silu(run(parts["linear"][:n], x)[..., :width])
            else:
                x = run(parts["output"][:n], x)
        x = x.flatten(0, 1)
        if heads.vocab_size is None:
            x = self._kernels.linear(self._lm_head, x)
        best = self._kernels.top(x, self._width, k)
        if (token_map := model.draft_tokens) is not None:
            best = token_map[best]
        return best.view(n, len(hidden), k).transpose(0, 1)

    def guess(self, head: int, hidden: Tensor, known: Tensor, k: int) -> Tensor:
        n, nodes, _ = known.shape
        rows = hidden[:, None].expand(n, nodes, -1).flatten(0, 1)
        run, width, x = self._kernels.linear, hidden.shape[1], rows
        for parts in self._packed:
            if "fc1" in parts:
                seen = known.flatten(0, 1)[:, : tokens_seen(self._model.heads.kind, head)]
                inner = F.silu(run(parts["fc1"][head], RootBlock.inputs(rows, self._embed(seen))))
                x = x + run(parts["fc2"][head], inner)[..., :width]
            elif "linear" in parts:
                x = x + F.silu(run(parts["linear"][head], x)[..., :width])
            else:
                x = run(parts["output"][head], x)
        if self._model.heads.vocab_size is None:
            x = run(self._lm_head, x)
        best = self._kernels.top(x, self._width, k)
        if (token_map := self._model.draft_tokens) is not None:
            best = token_map[best]
        return best.view(n, nodes, k)

    def _embed(self, roots: Tensor) -> Tensor:
        model = self._model
        if hasattr(model, "root_embedding") or hasattr(model.model, "embed_tokens"):
            return model.embed_root(roots)
        return self._tied.rows(roots.flatten()).view(*roots.shape, -1)


def _problem(config: ModelConfig, heads: HeadShape) -> str:
    """Why a model of this shape cannot run on the kernels; "" where it can."""
    if config.hidden_size % PAIR or config.intermediate_size % COLS:
        return (
            f"widths of {config.hidden_size} and {config.intermediate_size} are not in 32s and 16s"
        )
    if heads.inner_size % COLS:
        return f"the heads' inner size {heads.inner_size} is not in {COLS}s"
    if config.head_dim not in HEAD_DIMS:
        return f"head_dim {config.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
    return ""


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, LINEARS)


def _take(module: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """Weight, scale, bias and block of a linear layer; a quantized one gives its weight away."""
    if isinstance(module, QuantizedLinear):
        weight, module.weight = module.weight, module.weight.new_empty(0)
        return weight, module.scale, module.bias, module.block
    assert isinstance(module, nn.Linear)
    return module.weight, None, module.bias, 1


def _pack(module: nn.Module) -> PackedLinear:
    return pack(*_take(module))


def _pack_layer(layer: LlamaDecoderLayer) -> PackedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    assert attention.qkv_proj is not None and mlp.gate_up_proj is not None
    weight, scale, bias, block = _take(mlp.gate_up_proj)
    scale, bias = (None if t is None else interleave(*t.chunk(2)) for t in (scale, bias))
    return PackedLayer(
        layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight,
        _pack(attention.qkv_proj),
        _pack(attention.o_proj),
        pack(interleave(*weight.chunk(2)), scale, bias, block),
        _pack(mlp.down_proj),
    )


def _row_table(
    entries: Sequence[Entry], store: KVStore
) -> tuple[NDArray[np.void], NDArray[np.int32], NDArray[np.int64]]:
    """Rows for `NativeLayers.run`, the rows they see, and positions int64 [rows]."""
    tables, numbers, positions, first = [], [], [], 0
    for entry in entries:
        cache, slot = store.find(entry.slot)
        seen, counts, depths = _step_shape(tuple(entry.parents))
        table = np.zeros(len(counts), ROW)
        layer, per_slot, head, _, _ = cache.k.stride()
        table["k"] = cache.k.data_ptr() + slot * per_slot * 4
        table["v"] = cache.v.data_ptr() + slot * per_slot * 4
        table["layer"], table["head"] = layer, head
        table["start"] = entry.start
        table["place"] = entry.start + np.arange(len(counts))
        table["seen"] = first + np.cumsum(counts) - counts
        table["count"] = counts
        tables.append(table)
        numbers.append(seen)
        positions.append(entry.start + depths)
        first += len(seen)
    return np.concatenate(tables), np.concatenate(numbers), np.concatenate(positions)


@lru_cache(maxsize=256)
def _step_shape(
    parents: tuple[int, ...],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """Of a tree: each node's line of ancestors with itself, how many these are, and depths."""
    lines: list[list[int]] = []
    for node, parent in enumerate(parents):
        lines.append([*(lines[parent] if parent >= 0 else ()), node])
    flat = np.fromiter((n for line in lines for n in line), np.int32)
    counts = np.fromiter(map(len, lines), np.int32)
    return flat, counts, np.fromiter(depths_of(parents), np.int64)
