"""Bytes that each stage of a split needs, from the shapes of its tensors.

Weights and KV caches are exact: the loader refuses a tensor of another shape than the model's
config tells, and a cache is one block of known shape. (Quantized weights are counted as a CPU has
them; on CUDA torchao has its own forms.) Activations are the tensors that are alive
at the widest point of the largest step, counted from the forward in engine/model/llama.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint.head_choices import best_choices, read_acceptance
from engine.checkpoint.head_layouts import HeadSpec, part_shapes
from engine.checkpoint.preflight import find_heads
from engine.config import JupiterConfig
from engine.decoding.tree import MAX_NODES, choose_tree
from engine.model.config import ModelConfig
from engine.model.head_kinds import tokens_seen
from engine.model.quantization import linear_bytes

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Shapes = dict[str, tuple[int, ...]]
# What is quantized as one product; see `fuse_projections`.
FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class StageSize:
    """What one stage holds; all sizes in bytes."""

    first_layer: int
    num_layers: int
    layers: int
    embedding: int = 0
    norm: int = 0
    lm_head: int = 0
    """0 where it is the embedding of the same stage (tied weights, one stage, not quantized)."""
    heads: int = 0
    kv_per_sequence: int = 0
    activations: int = 0
    holds: tuple[str, ...] = ()
    """What it has besides decoder layers: "embedding", "norm", "lm_head", "5 heads"."""

    @property
    def weights(self) -> int:
        """Bytes of all its parameters."""
        return self.layers + self.embedding + self.norm + self.lm_head + self.heads

    def kv(self, sequences: int = 1) -> int:
        """Bytes of the KV caches once so many sequences were in work at one time.

        The stage makes them in blocks that double: room for 1, 2, 4, 8, ... sequences.
        """
        return self.kv_per_sequence * (1 << max(sequences - 1, 0).bit_length())

    def total(self, sequences: int = 1) -> int:
        """Weights, KV caches and activations together."""
        return self.weights + self.kv(sequences) + self.activations


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of a model's parts as a config runs it, wherever they lie."""

    num_layers: int
    layer: int
    """Weights of one decoder layer."""
    embedding: int
    norm: int
    lm_head: int
    heads: int
    num_heads: int
    tied: bool
    """`lm_head` is the embedding; a stage that holds both has it once, unless it is quantized."""
    quantized: bool
    token_heads: bool
    """The heads look up embeddings, so that the last stage needs them too."""
    kv_layer: int
    """KV cache of one sequence in one layer."""
    activations: int
    """Of a stage without `lm_head`."""
    judging: int
    """Activations that `lm_head`, heads and acceptance need instead, on the last stage."""
    max_sequences: int

    def stages(self, split: Sequence[int]) -> list[StageSize]:
        """Each stage of `split`, the layers of which need not add up to the model's."""
        found, shared = [], self.tied and not self.quantized
        for rank, count in enumerate(split):
            first, last = rank == 0, rank == len(split) - 1
            embedding = first or (last and self.token_heads and not self.tied)
            holds = ["embedding"] if embedding else []
            if last:
                holds += ["norm", "lm_head"]
                if self.num_heads:
                    holds.append(f"{self.num_heads} head{'s' if self.num_heads > 1 else ''}")
            found.append(
                StageSize(
                    first_layer=sum(split[:rank]),
                    num_layers=count,
                    layers=count * self.layer,
                    embedding=self.embedding if embedding else 0,
                    norm=self.norm if last else 0,
                    lm_head=self.lm_head if last and not (first and shared) else 0,
                    heads=self.heads if last else 0,
                    kv_per_sequence=count * self.kv_layer,
                    activations=max(self.activations, self.judging if last else 0),
                    holds=tuple(holds),
                )
            )
        return found


def read_sizes(folder: Path, config: JupiterConfig) -> ModelSizes:
    """Measure the model in `folder` and the heads of `config`, reading no weights.

    Raises:
        CheckpointError: a file that is missing, damaged or of another kind; it is named.
        ConfigError: a draft tree that does not fit the heads.
    """
    model = ModelConfig.from_folder(folder)
    found = find_heads(config, folder)
    spec = found[1] if found else None
    tree = choose_tree(
        config.medusa_choices,
        spec.num_heads if spec else 0,
        best_choices(read_acceptance(found[0]) if found else None),
    )
    item = DTYPE_BYTES[config.torch_dtype]
    context = min(config.max_kv_cache_length, model.context_limit)
    return ModelSizes(
        num_layers=model.num_hidden_layers,
        layer=_layer_bytes(model, item, config.weight_bits),
        embedding=model.vocab_size * model.hidden_size * item,
        norm=model.hidden_size * item,
        lm_head=_bytes(
            {"lm_head.weight": (model.vocab_size, model.hidden_size)}, item, config.weight_bits
        ),
        heads=_bytes(head_shapes(spec), item, config.weight_bits) if spec else 0,
        num_heads=spec.num_heads if spec else 0,
        tied=model.tie_word_embeddings,
        quantized=config.weight_bits is not None,
        token_heads=spec is not None and spec.kind != "resblock",
        kv_layer=2 * model.num_key_value_heads * (context + MAX_NODES) * model.head_dim * item,
        activations=max(
            _forward_bytes(model, config.max_sub_sequence_len, context, item),
            _forward_bytes(model, tree.size, context, item),
        ),
        judging=_judging_bytes(model, spec, tree.size, item),
        max_sequences=config.max_num_seqs,
    )


def stage_sizes(folder: Path, config: JupiterConfig) -> list[StageSize]:
    """Each stage of `config` on the model in `folder`; raises as `read_sizes`."""
    return read_sizes(folder, config).stages(config.stage_num_hidden_layers_list)


def layer_shapes(model: ModelConfig) -> Shapes:
    """The parameters of one decoder layer, named within it as in the checkpoint."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden, model.attention_bias),
        "self_attn.k_proj": (keys, hidden, model.attention_bias),
        "self_attn.v_proj": (keys, hidden, model.attention_bias),
        "self_attn.o_proj": (hidden, queries, model.attention_out_bias),
        "mlp.gate_proj": (inner, hidden, model.mlp_bias),
        "mlp.up_proj": (inner, hidden, model.mlp_bias),
        "mlp.down_proj": (hidden, inner, model.mlp_bias),
    }
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for name, (rows, columns, bias) in linears.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    return shapes


def head_shapes(spec: HeadSpec) -> Shapes:
    """The parameters of all heads, by their canonical names without `medusa_head.`."""
    hidden = spec.hidden_size
    shapes: Shapes = {}
    for head in range(spec.num_heads):
        for layer in range(spec.num_layers):
            seen = tokens_seen(spec.kind, head) if layer == 0 else 0
            for part, shape in part_shapes(hidden, spec.inner_size, seen).items():
                if part.startswith("fc" if seen else "linear"):
                    shapes[f"{head}.{layer}.{part}"] = shape
        if spec.vocab_size is not None:
            shapes[f"{head}.{spec.num_layers}.weight"] = (spec.vocab_size, hidden)
    return shapes


def _bytes(shapes: Shapes, item: int, bits: int | None = None) -> int:
    """Of `lm_head`, or of heads; quantized linears among them have 8 bits, whatever `bits` says."""
    if bits is None:
        return item * sum(math.prod(shape) for shape in shapes.values())
    return sum(
        linear_bytes(*shape, bias=f"{name.removesuffix('weight')}bias" in shapes, bits=8)
        for name, shape in shapes.items()
        if len(shape) == 2
    )


def _layer_bytes(model: ModelConfig, item: int, bits: int | None) -> int:
    """Weights of one decoder layer as a stage holds them."""
    shapes = layer_shapes(model)
    if bits is None:
        return _bytes(shapes, item)
    total = item * 2 * model.hidden_size  # the norms
    for joined in FUSED:
        (columns,) = {shapes[f"{name}.weight"][1] for name in joined}
        rows = sum(shapes[f"{name}.weight"][0] for name in joined)
        bias = f"{joined[0]}.bias" in shapes
        total += linear_bytes(rows, columns, bias=bias, bits=bits)
    return total


def _forward_bytes(model: ModelConfig, rows: int, context: int, item: int) -> int:
    """Tensors alive at the widest point of a layer, for `rows` at the end of the context."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    # Made once for all layers: the mask of the query heads that share a KV head, cosine and sine.
    groups = model.num_attention_heads // model.num_key_value_heads
    shared = (groups * rows * context + 2 * rows * model.head_dim) * item
    # The residual and its norm; q, k, v; then q and k turned, with what turning them takes.
    attention = (2 * hidden + (queries + 2 * keys) + (4 * queries + keys)) * item
    if item < 4:  # half precision is worked on in float32
        attention += 4 * hidden
    # The residual twice and its norm; gate and up in one; the activation, the product, the sum.
    mlp = (3 * hidden + 4 * inner) * item
    return shared + rows * max(attention, mlp)


def _judging_bytes(model: ModelConfig, spec: HeadSpec | None, nodes: int, item: int) -> int:
    """Logits of a tree, their float64 probabilities, and the heads' logits, of one sequence."""
    vocabulary = model.vocab_size
    logits = nodes * vocabulary * (item + (0 if item == 4 else 4))
    # In float64: four copies for softmax, entropy and the bar of typical acceptance; seven, of a
    # node at a time, for the order and the cumulative sum of nucleus sampling.
    accepting = max(4 * nodes, 7) * vocabulary * 8
    drafting = 0
    if spec is not None:
        rows = spec.vocab_size or vocabulary
        drafting = 2 * spec.num_heads * rows * item
    return logits + max(accepting, drafting)
