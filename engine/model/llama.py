"""The Llama family as plain modules: parameter names are Hugging Face's, no ranks in a forward.

Rows, not batches: a forward takes the rows of any number of sequences one under the other,
[rows, hidden_size], and a `Rows` that says which rows belong to which KV cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.model.config import ModelConfig
from engine.model.kv_cache import KVCache


@dataclass
class Segment:
    """Consecutive rows of one sequence."""

    rows: slice
    cache: KVCache | None = None
    """None in training: the rows see only themselves, causally, and gradients flow."""
    slot: int = 0
    """The sequence's number in the cache."""
    start: int = 0
    """KV rows of the sequence that come before these."""
    mask: Tensor | None = None
    """Additive, [groups * n, start + n], or None when every row sees everything."""


@dataclass
class Group:
    """Rows of several sequences in one cache, n of each, which attend in one product.

    One small product per sequence would cost more in calls than in arithmetic.
    """

    rows: Tensor
    """int64 [sequences, n]: where they are in the forward."""
    cache: KVCache
    slots: Tensor
    """int64 [sequences, 1], ascending."""
    places: Tensor
    """int64 [sequences, n]: where their keys and values go."""
    span: slice
    """All slots from the first to the last."""
    end: int
    """KV rows up to the end of the longest."""
    mask: Tensor
    """Additive, [slots of span, 1, groups * n, end]; rows of slots that are not in it are junk."""


@dataclass
class Rows:
    """How the rows of one forward attend."""

    positions: Tensor
    """int64 [rows]."""
    segments: list[Segment]
    groups: list[Group] = field(default_factory=list)


class LlamaRMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[rows, hidden_size] -> the same shape and dtype."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class LlamaRotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021) with linear and llama3 scaling."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.freqs: Tensor | None = None

    def inverse_frequencies(self) -> Tensor:
        """float32 [head_dim / 2]."""
        config, scaling = self.config, self.config.rope_scaling
        exponents = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
        freqs = 1.0 / config.rope_theta**exponents
        if scaling.rope_type == "linear":
            return freqs / scaling.factor
        if scaling.rope_type == "llama3":
            # Long waves are stretched by `factor`, short ones kept, those between blended.
            wavelength = 2 * math.pi / freqs
            span = scaling.high_freq_factor - scaling.low_freq_factor
            ratio = scaling.original_max_position_embeddings / wavelength
            keep = ((ratio - scaling.low_freq_factor) / span).clamp(0, 1)
            return freqs * keep + freqs / scaling.factor * (1 - keep)
        return freqs

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of int64 positions [rows], each [rows, 1, head_dim]."""
        if self.freqs is None or self.freqs.device != positions.device:
            self.freqs = self.inverse_frequencies().to(positions.device)
        angles = torch.outer(positions.float(), self.freqs)
        angles = torch.cat((angles, angles), dim=-1)[:, None, :]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [rows, heads, head_dim] by the angles of its rows' positions."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class LlamaAttention(nn.Module):
    """Grouped-query attention over the sequences' own KV caches."""

    def __init__(self, config: ModelConfig, rotary_emb: LlamaRotaryEmbedding) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_out_bias)
        self.rotary_emb = rotary_emb
        self.qkv_proj: nn.Linear | None = None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [rows, heads, d], keys and values [rows, kv_heads, d], before rotation."""
        if self.qkv_proj is not None:
            heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
            qkv = self.qkv_proj(x).view(len(x), sum(heads), self.head_dim)
            q, k, v = qkv.split(heads, dim=1)
            return q, k, v
        shape = (len(x), -1, self.head_dim)
        return self.q_proj(x).view(shape), self.k_proj(x).view(shape), self.v_proj(x).view(shape)

    def forward(self, x: Tensor, rows: Rows, angles: tuple[Tensor, Tensor], layer: int) -> Tensor:
        """[rows, hidden_size] -> the same; writes each segment's keys and values."""
        q, k, v = self.project(x)
        q, k = rotate(q, *angles), rotate(k, *angles)
        return self.o_proj(self.attend_rows(q, k, v, rows, layer))

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, layer: int) -> Tensor:
        """Attention of all rows, each to its own sequence: [rows, heads * head_dim]."""
        parts = [self.attend(q[s.rows], k[s.rows], v[s.rows], s, layer) for s in rows.segments]
        if not rows.groups:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        out = q.new_empty(len(q), self.num_heads * self.head_dim)
        for segment, part in zip(rows.segments, parts, strict=True):
            out[segment.rows] = part
        for group in rows.groups:
            out[group.rows] = self.attend_group(q, k, v, group, layer)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segment: Segment, layer: int) -> Tensor:
        """Attention of one sequence's n rows: [n, heads * head_dim]."""
        n, groups = len(q), self.num_heads // self.num_kv_heads
        if segment.cache is None:
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out[0].transpose(0, 1).reshape(n, self.num_heads * self.head_dim)
        keys, values = segment.cache.write(
            layer, segment.slot, segment.start, k.transpose(0, 1), v.transpose(0, 1)
        )
        # The query heads of one KV head become rows of one product, so KV is never repeated.
        q = q.view(n, self.num_kv_heads, groups, self.head_dim).permute(1, 2, 0, 3)
        q = q.reshape(1, self.num_kv_heads, groups * n, self.head_dim)
        out = F.scaled_dot_product_attention(
            q, keys.unsqueeze(0), values.unsqueeze(0), attn_mask=segment.mask
        )
        out = out.view(self.num_kv_heads, groups, n, self.head_dim).permute(2, 0, 1, 3)
        return out.reshape(n, self.num_heads * self.head_dim)

    def attend_group(self, q: Tensor, k: Tensor, v: Tensor, group: Group, layer: int) -> Tensor:
        """Attention of a group's rows out of all rows: [sequences, n, heads * head_dim]."""
        sequences, n = group.rows.shape
        groups, span, end = self.num_heads // self.num_kv_heads, group.span, group.end
        keys, values = group.cache.write_many(
            layer, group.slots, group.places, k[group.rows], v[group.rows]
        )
        # Slots between the group's own are computed along, so that no key is ever copied.
        q_all = q.new_zeros(span.stop - span.start, self.num_kv_heads, groups, n, self.head_dim)
        own = group.slots[:, 0] - span.start
        q_all[own] = (
            q[group.rows].view(sequences, n, self.num_kv_heads, groups, -1).permute(0, 2, 3, 1, 4)
        )
        out = F.scaled_dot_product_attention(
            q_all.flatten(2, 3),
            keys[span, :, :end],
            values[span, :, :end],
            attn_mask=group.mask,
        )
        out = out.view(q_all.shape)[own].permute(0, 3, 1, 2, 4)
        return out.reshape(sequences, n, self.num_heads * self.head_dim)


class LlamaMLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act_fn = nn.SiLU()
        self.gate_up_proj: nn.Linear | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[rows, hidden_size] -> the same."""
        if self.gate_up_proj is not None:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.act_fn(gate) * up)


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and a residual."""

    def __init__(self, config: ModelConfig, rotary_emb: LlamaRotaryEmbedding) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, rotary_emb)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rows: Rows, angles: tuple[Tensor, Tensor], layer: int) -> Tensor:
        """[rows, hidden_size] -> the same."""
        x = x + self.self_attn(self.input_layernorm(x), rows, angles, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class LayerRange(nn.ModuleList):
    """Consecutive decoder layers under their own numbers in the whole model.

    Every parameter of a stage so has the name it has in the checkpoint.
    """

    def __init__(self, numbers: range, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        for number, layer in zip(numbers, layers, strict=True):
            self.add_module(str(number), layer)

    def _get_name(self) -> str:
        return "ModuleList"


class LlamaModel(nn.Module):
    """Embedding (first stage), a range of layers, final norm (last stage)."""

    def __init__(self, config: ModelConfig, layers: range, *, first: bool, last: bool) -> None:
        super().__init__()
        if first:
            # Not left to torch: drawing numbers on the meta device loads its compiler, two seconds.
            weight = torch.zeros(config.vocab_size, config.hidden_size)
            self.embed_tokens = nn.Embedding(
                config.vocab_size,
                config.hidden_size,
                padding_idx=config.pad_token_id,
                _weight=weight,
            )
        rotary_emb = LlamaRotaryEmbedding(config)
        self.layers = LayerRange(layers, (LlamaDecoderLayer(config, rotary_emb) for _ in layers))
        if last:
            self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        # Not registered: it is a child of every attention already, as in the original's tree.
        self.__dict__["rotary_emb"] = rotary_emb

    rotary_emb: LlamaRotaryEmbedding

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Token ids int64 [rows] (first stage) or hidden states [rows, hidden_size].

        Returns hidden states [rows, hidden_size], before the final norm.
        """
        if hasattr(self, "embed_tokens"):
            x = self.embed_tokens(x)
        angles = self.rotary_emb(rows.positions, x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, rows, angles, index)
        return x
