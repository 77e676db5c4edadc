"""A stage's forward on the compiled kernels: the same results as the modules, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from engine.decoding.tree import ROOT_ONLY, Tree, with_chain
from engine.kernels.arena import Arena
from engine.kernels.build import NoKernelsError
from engine.kernels.native import (
    COLS,
    PAIR,
    EntryRows,
    HeadParts,
    Kernels,
    NativeHeads,
    NativeLayers,
    PackedLayer,
    PackedLinear,
    interleave,
    pack,
)
from engine.kernels.packing import pack_module, take_weights
from engine.model.config import ModelConfig
from engine.model.head_kinds import tokens_seen
from engine.model.kv_cache import KVStore
from engine.model.llama import LlamaDecoderLayer
from engine.model.medusa import HeadShape, MedusaLlamaForCausalLM, ResBlock, RootBlock
from engine.pipeline.batch import Entry, Result
from engine.pipeline.scores import NodeScores

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
"""Sizes that `attend_any` of attention.h is compiled for."""
FIRST_NODES = 8
"""Nodes of a tree whose likeliest token is looked up at once: while `lm_head` comes from memory, so
many are computed."""
FIRST_NODES_BESIDE = 3
"""With other trees beside it, which have it read as well."""


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
        arena = Arena()
        self._last = hasattr(model.model, "norm")
        self._turns = (torch.empty(0), torch.empty(0))
        self._head_bytes = 0
        self.use_layers([_pack_layer(layer, arena) for layer in model.model.layers])  # type: ignore[arg-type]
        if self._last:
            self._lm_head = pack_module(model.lm_head, arena)
            self._head_bytes += self._lm_head.nbytes
            self._pack_heads(arena)

    def use_layers(self, layers: Sequence[PackedLayer]) -> None:
        """Have these layers from now on, and a new KVStore, in the place of those of before."""
        model, config = self._model, self._model.config
        self.packed_layers = list(layers)
        self._places: dict[int, tuple[int, int, int, int]] = {}
        self._layers = NativeLayers(
            self._kernels,
            layers,
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            embedding=_embedding(model),
            final_norm=model.model.norm.weight if self._last else None,
        )

    @property
    def packed_bytes(self) -> int:
        """See Forward."""
        return self._head_bytes + sum(layer.nbytes for layer in self.packed_layers)

    def _pack_heads(self, arena: Arena) -> None:
        model, parts = self._model, _NO_PARTS
        if model.heads.num_heads:
            parts = _head_parts(model, arena)
            lists = [parts.fc1, parts.fc2, parts.outputs, *parts.blocks]
            self._head_bytes += sum(w.nbytes for each in lists for w in each)
        if not parts.outputs:
            parts = replace(parts, outputs=[self._lm_head])
        vocabulary, count = model.config.vocab_size, model.heads.num_heads
        self._heads = NativeHeads(self._kernels, self._lm_head, vocabulary, count, parts)

    @property
    def progress(self) -> int:
        """See Forward."""
        return self._kernels.progress

    def use_threads(self, threads: int) -> None:
        """See Forward."""
        self._kernels.use(threads)

    def layers(self, x: Tensor | Sequence[int], entries: Sequence[Entry], store: KVStore) -> Tensor:
        """See Forward."""
        rows = (EntryRows * len(entries))()
        parents: list[int] = []
        keep: list[int] = []
        end = 0
        for place, entry in zip(rows, entries, strict=True):
            place.k, place.v, place.layer, place.head = self._place(entry.slot, store)
            place.start, place.rows = entry.start, len(entry.parents)
            place.keep_to, place.kept = entry.keep_to, len(entry.keep)
            parents += entry.parents
            keep += entry.keep
            end = max(end, place.start + place.rows)
        return self._layers.run(x, rows, parents, keep, end, *self._turns_to(end), more=self._last)

    def _place(self, slot: int, store: KVStore) -> tuple[int, int, int, int]:
        """Addresses of a slot's keys and values, and floats from layer to layer, head to head."""
        if slot not in self._places:
            cache, number = store.find(slot)
            layer, per_slot, head, _, _ = cache.k.stride()
            at = number * per_slot * cache.k.element_size()
            self._places[slot] = cache.k.data_ptr() + at, cache.v.data_ptr() + at, layer, head
        return self._places[slot]

    def _turns_to(self, end: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the positions up to `end`, float32 [at least `end`, head_dim / 2]."""
        if len(self._turns[0]) < end:
            half = self._model.config.head_dim // 2
            found = self._model.model.rotary_emb(torch.arange(2 * end), torch.float32)
            self._turns = tuple(each[:, 0, :half].contiguous() for each in found)
        return self._turns

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [rows, vocab_size] of normed hidden states."""
        out = self._kernels.linear(self._lm_head, hidden, more=True)
        return out[:, : self._model.config.vocab_size]

    def best(self, hidden: Tensor) -> list[int]:
        """See Forward; the logits themselves are never stored."""
        return self._kernels.best(self._lm_head, hidden, self._model.config.vocab_size, more=True)

    def draft(
        self,
        hidden: Tensor,
        roots: Tensor,
        k: int,
        heads: int | None = None,
        tree: Tree | None = None,
    ) -> Tensor:
        """As MedusaLlamaForCausalLM.draft."""
        count = self._count(heads)
        return self._heads.draft(hidden, roots.tolist(), k, count, self._along(count, tree))

    def guess(self, head: int, hidden: Tensor, known: Tensor, k: int) -> Tensor:
        """As MedusaLlamaForCausalLM.guess."""
        n, nodes, _ = known.shape
        rows = hidden[:, None].expand(n, nodes, -1).flatten(0, 1)
        seen = known.flatten(0, 1)[:, : tokens_seen(self._model.heads.kind, head)]
        return self._heads.guess(head, rows, seen, k).view(n, nodes, k)

    def _along(self, count: int, tree: Tree | None) -> Tree | None:
        """The tree that the heads draft along, where they do."""
        if self._model.heads.kind != "hydra":
            return None
        return tree or with_chain(ROOT_ONLY, count)

    def _count(self, heads: int | None) -> int:
        count = self._model.heads.num_heads
        return count if heads is None else min(heads, count)

    def judge_greedy(
        self, trees: Sequence[NodeScores], k: int, heads: int | None, along: Tree | None
    ) -> list[Result] | None:
        """See Forward."""
        count = self._count(heads)
        tokens: list[int] = []
        parents: list[int] = []
        for tree in trees:
            tokens += tree.tokens
            parents += tree.parents
        alone = len(trees) == 1
        found = self._heads.judge(
            trees[0].hidden if alone else torch.cat([tree.hidden for tree in trees]),
            [len(tree.tokens) for tree in trees],
            tokens,
            parents,
            first_nodes=FIRST_NODES if alone else FIRST_NODES_BESIDE,
            k=k,
            heads=count if k else 0,
            along=self._along(count, along) if k else None,
        )
        return [Result(*each) for each in found]


_NO_PARTS = HeadParts([], [], [], [], own_output=False, width=0, tokens=None, embedding=None)


def _embedding(model: MedusaLlamaForCausalLM) -> Tensor | None:
    return model.model.embed_tokens.weight if hasattr(model.model, "embed_tokens") else None


def _head_parts(model: MedusaLlamaForCausalLM, arena: Arena) -> HeadParts:
    """The heads as the kernels take them, without outputs where they share `lm_head`."""
    heads = model.heads
    columns = list(zip(*model.medusa_head, strict=True))

    def packed(kind: type[nn.Module], name: str) -> list[list[PackedLinear]]:
        chosen = [column for column in columns if isinstance(column[0], kind)]
        return [[pack_module(getattr(block, name), arena) for block in column] for column in chosen]

    fc1, fc2 = packed(RootBlock, "fc1"), packed(RootBlock, "fc2")
    outputs = []
    if heads.vocab_size is not None:
        outputs = [pack_module(block, arena) for block in columns[-1]]
    elif model.draft_head is not None:
        outputs = [pack_module(model.draft_head, arena)]
    cut = model.draft_tokens
    return HeadParts(
        blocks=packed(ResBlock, "linear"),
        fc1=fc1[0] if fc1 else [],
        fc2=fc2[0] if fc2 else [],
        outputs=outputs,
        own_output=heads.vocab_size is not None,
        width=len(cut) if cut is not None else heads.vocab_size or model.config.vocab_size,
        tokens=None if cut is None else cut.tolist(),
        embedding=model.root_embedding.weight
        if hasattr(model, "root_embedding")
        else _embedding(model),
    )


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


def _pack_layer(layer: LlamaDecoderLayer, arena: Arena) -> PackedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    assert attention.qkv_proj is not None and mlp.gate_up_proj is not None
    weight, scale, bias, block = take_weights(mlp.gate_up_proj)
    bias = None if bias is None else interleave(*bias.chunk(2))
    return PackedLayer(
        layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight,
        pack_module(attention.qkv_proj, arena),
        pack_module(attention.o_proj, arena),
        pack(interleave(*weight.chunk(2)), interleave(*scale.chunk(2)), bias, block, arena=arena),
        pack_module(mlp.down_proj, arena),
    )
