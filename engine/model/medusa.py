"""Llama with Medusa heads (Cai et al. 2024), whole or one stage of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.decoding.tree import ROOT_ONLY, Tree, with_chain
from engine.model.config import ModelConfig
from engine.model.head_kinds import HeadKind, tokens_seen
from engine.model.llama import LlamaDecoderLayer, LlamaModel, Rows
from engine.model.quantize import QuantizedLinear


@dataclass(frozen=True)
class HeadShape:
    """How many Medusa heads there are and what they are made of."""

    num_heads: int
    num_layers: int = 1
    """Blocks per head."""
    vocab_size: int | None = None
    """Rows of each head's own output layer; None when the heads share `lm_head`."""
    token_map: tuple[int, ...] | None = None
    """Tokens that the heads draft from, where these are a part of the vocabulary: of each output
    row, or rows of a shared `lm_head`."""
    kind: HeadKind = "resblock"
    inner_size: int = 0
    """Width between the two products of the first block of a head that sees tokens."""


NO_HEADS = HeadShape(0)


class ResBlock(nn.Module):
    """x + SiLU(linear(x)); a new one is the identity, because `linear` starts at zero."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same."""
        return x + self.act(self.linear(x))


class RootBlock(nn.Module):
    """x + fc2(SiLU(fc1([norm(x); norm(e0); ...]))), e the embeddings of the tokens that follow x.

    The first of them, the root of the draft tree, is known when drafting begins; a ResBlock has to
    guess it along with what comes after. Heads of the kind "hydra" see the drafted ones too. A new
    block is the identity, because `fc2` starts at zero. All inputs are brought to a root mean
    square of 1, whatever the model's own scales are.
    """

    def __init__(self, hidden_size: int, inner_size: int, tokens: int = 1) -> None:
        super().__init__()
        self.fc1 = nn.Linear((1 + tokens) * hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Hidden states [n, hidden_size] and embeddings [n, tokens, hidden_size] -> as x."""
        return x + self.fc2(self.act(self.fc1(self.inputs(x, seen))))

    @staticmethod
    def inputs(x: Tensor, seen: Tensor) -> Tensor:
        """What `fc1` takes: all inputs side by side, [n, (1 + tokens) * hidden_size]."""
        return torch.cat((_normed(x), _normed(seen).flatten(-2)), dim=-1)


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


class MedusaLlamaForCausalLM(nn.Module):
    """A stage: its own layers only, the embedding if first; norm, lm_head and heads if last.

    With the default arguments it is the whole model. Module tree and parameter names are those
    of the merged checkpoint, so a state dict loads by key on every stage.
    """

    def __init__(
        self,
        config: ModelConfig,
        heads: HeadShape = NO_HEADS,
        *,
        layers: range | None = None,
        first: bool = True,
        last: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.heads = heads
        layers = range(config.num_hidden_layers) if layers is None else layers
        self.model = LlamaModel(config, layers, first=first, last=last)
        if not last:
            return
        self.lm_head: nn.Linear | QuantizedLinear = nn.Linear(
            config.hidden_size, config.vocab_size, bias=False
        )
        if first and config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if heads.num_heads:
            self.medusa_head = nn.ModuleList(self._head(head) for head in range(heads.num_heads))
        self.draft_head: nn.Linear | QuantizedLinear | None = None
        if heads.kind != "resblock" and not first and not config.tie_word_embeddings:
            self.root_embedding = nn.Embedding(
                config.vocab_size,
                config.hidden_size,
                _weight=torch.zeros(config.vocab_size, config.hidden_size),
            )

    def _head(self, head: int) -> nn.Sequential:
        width, heads = self.config.hidden_size, self.heads
        modules: list[nn.Module] = [ResBlock(width) for _ in range(heads.num_layers)]
        if seen := tokens_seen(heads.kind, head):
            modules[0] = RootBlock(width, heads.inner_size, seen)
        if heads.vocab_size is not None:
            modules.append(nn.Linear(width, heads.vocab_size, bias=False))
        return nn.Sequential(*modules)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Token ids int64 [rows] or hidden states -> hidden states [rows, hidden_size].

        On the last stage they are normed, ready for `lm_head` and the heads.
        """
        x = self.model(x, rows)
        return self.model.norm(x) if hasattr(self.model, "norm") else x

    def head_hidden(self, head: int, hidden: Tensor, known: Tensor) -> Tensor:
        """What goes into a head's output layer: [n, hidden_size].

        Args:
            hidden: normed, [n, hidden_size].
            known: int64 [n, tokens], those that follow each, at least as many as the head sees.
        """
        blocks = list(self.medusa_head[head])[: self.heads.num_layers]  # type: ignore[call-overload]
        if seen := tokens_seen(self.heads.kind, head):
            hidden = blocks.pop(0)(hidden, self.embed_root(known[:, :seen]))
        for block in blocks:
            hidden = block(hidden)
        return hidden

    def embed_root(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., hidden_size] of tokens [...], through which no gradient flows."""
        if hasattr(self, "root_embedding"):
            weight = self.root_embedding.weight
        elif hasattr(self.model, "embed_tokens"):
            weight = self.model.embed_tokens.weight
        else:
            if isinstance(self.lm_head, QuantizedLinear):  # a tied one, as below
                return self.lm_head.rows(tokens).to(self.model.norm.weight.dtype)
            weight = self.lm_head.weight
        return F.embedding(tokens, weight.detach())

    def draft(
        self,
        hidden: Tensor,
        roots: Tensor,
        k: int,
        heads: int | None = None,
        tree: Tree | None = None,
    ) -> Tensor:
        """The likeliest tokens, int64 [n, lists, k], likeliest first.

        Of heads that do not see what was drafted there is one list for each head; of "hydra" heads
        one for each inner node of `tree`, in the nodes' order.

        Args:
            hidden: normed, [n, hidden_size].
            roots: int64 [n], the token that follows each.
            k: length of a list.
            heads: how many, the first ones; None for all.
            tree: for "hydra" heads, at most as deep as there are heads; None for one path.
        """
        count = self.heads.num_heads if heads is None else min(heads, self.heads.num_heads)
        if self.heads.kind == "hydra":
            tree = tree or with_chain(ROOT_ONLY, count)
            return draft_along(tree, roots, lambda head, known: self.guess(head, hidden, known, k))
        known = roots[:, None]
        outputs = [self.head_hidden(h, hidden, known) for h in range(count)]
        if self.heads.vocab_size is None:
            logits = torch.stack(self._shared_output(torch.cat(outputs)).split(len(hidden)))
        else:
            pairs = zip(self.medusa_head, outputs, strict=False)
            logits = torch.stack([head[-1](x) for head, x in pairs])  # type: ignore[index]
        return self._tokens(logits.topk(k, dim=-1).indices).transpose(0, 1)

    def guess(self, head: int, hidden: Tensor, known: Tensor, k: int) -> Tensor:
        """One head's likeliest tokens int64 [n, nodes, k], behind each of several nodes.

        Args:
            hidden: normed, [n, hidden_size].
            known: int64 [n, nodes, tokens], from the root to each node.
        """
        n, nodes, _ = known.shape
        rows = hidden[:, None].expand(n, nodes, -1).flatten(0, 1)
        x = self.head_hidden(head, rows, known.flatten(0, 1))
        if self.heads.vocab_size is None:
            logits = self._shared_output(x)
        else:
            logits = self.medusa_head[head][-1](x)  # type: ignore[index]
        return self._tokens(logits.topk(k, dim=-1).indices).view(n, nodes, k)

    def _shared_output(self, x: Tensor) -> Tensor:
        return (self.draft_head or self.lm_head)(x)

    def _tokens(self, rows: Tensor) -> Tensor:
        """Token ids of rows of the heads' vocabulary."""
        token_map = self.draft_tokens
        return rows if token_map is None else token_map.to(rows.device)[rows]

    @cached_property
    def draft_tokens(self) -> Tensor | None:
        """Token id of each row of the heads' vocabulary, int64; None for all tokens in order."""
        cut = self.heads.vocab_size is not None or self.draft_head is not None
        return torch.tensor(self.heads.token_map) if cut and self.heads.token_map else None


def draft_along(tree: Tree, roots: Tensor, best: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Candidates at every inner node of `tree`, level by level: int64 [n, inner nodes, k].

    Args:
        roots: int64 [n].
        best: head and tokens from the root to each node of a level, int64 [n, nodes, tokens], to
            the candidates there, int64 [n, nodes, k].
    """
    known = roots[:, None, None]
    found: list[Tensor] = []
    for head, level in enumerate(tree.levels):
        if found:
            drafted = found[-1][:, level.parents, level.ranks]
            known = torch.cat((known[:, level.parents], drafted[..., None]), dim=-1)
        found.append(best(head, known))
    return torch.cat(found, dim=1)


def cut_draft_vocabulary(model: MedusaLlamaForCausalLM) -> None:
    """Give heads that share `lm_head` the rows that they draft from, in place, after loading.

    Fewer rows make drafting cheaper; a token that is none of them is simply never drafted.
    """
    heads = model.heads
    if heads.token_map is None or heads.vocab_size is not None or not hasattr(model, "lm_head"):
        return
    assert isinstance(model.lm_head, nn.Linear)
    weight = model.lm_head.weight.detach()
    rows = weight[torch.tensor(heads.token_map, device=weight.device)]
    head = model.draft_head = nn.Linear(1, 1, bias=False, device="meta")
    head.out_features, head.in_features = rows.shape
    head.weight = nn.Parameter(rows, requires_grad=False)


def fuse_projections(model: MedusaLlamaForCausalLM) -> None:
    """Join q, k, v and gate, up of every layer into one product each, in place.

    A transformation for inference, done after loading; the state dict loses its original names.
    """
    for layer in model.model.layers:
        assert isinstance(layer, LlamaDecoderLayer)
        attention, mlp = layer.self_attn, layer.mlp
        attention.qkv_proj = _join(attention, "q_proj", "k_proj", "v_proj")
        mlp.gate_up_proj = _join(mlp, "gate_proj", "up_proj")


def _join(owner: nn.Module, *names: str) -> nn.Linear:
    parts = [getattr(owner, name) for name in names]
    joined = nn.Linear(1, 1, bias=parts[0].bias is not None, device="meta")
    joined.in_features = parts[0].in_features
    joined.out_features = sum(part.out_features for part in parts)
    joined.weight = nn.Parameter(torch.cat([p.weight.data for p in parts]), requires_grad=False)
    if parts[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([p.bias.data for p in parts]), requires_grad=False)
    for name in names:
        delattr(owner, name)
    return joined
