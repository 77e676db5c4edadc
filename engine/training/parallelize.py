"""The parallel plan of a run: what each rank holds, what it updates, and with whom.

All of it is in `parallelize`. The model itself knows nothing of ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from engine.checkpoint.load import EMBEDDING, LM_HEAD, load_weights
from engine.errors import ConfigError
from engine.model.config import ModelConfig
from engine.model.llama import LlamaAttention
from engine.model.medusa import NO_HEADS, HeadShape, MedusaLlamaForCausalLM
from engine.training.batch import Sharing
from engine.training.begin_heads import begin_heads, go_on_from
from engine.training.context import share_attention
from engine.training.cross_entropy import SharedVocabulary
from engine.training.flat import FlatBuffer
from engine.training.mesh import Mesh
from engine.training.optimizer import Role, role_of
from engine.training.recompute import recompute
from engine.training.tensor_parallel import (
    Columns,
    Entered,
    Rows,
    Shard,
    Shared,
    Vocabulary,
    Whole,
    cut_to,
    root_lookup,
)

BUCKET = 8_000_000
"""Elements of a buffer at least, where messages overlap with computing: 32 MB."""
INITIAL_STD = 0.02


@dataclass(frozen=True)
class Plan:
    """What the arguments say about how the work is spread."""

    roles: frozenset[Role]
    """What learns."""
    split: Sequence[int] | None = None
    """Layers per stage; None splits evenly."""
    chunks: int = 1
    """Parts of the layers that each stage has."""
    sequence: bool = False
    """Between the products of a layer, tensor parallel ranks share the rows."""
    recompute: tuple[Literal["uniform", "block"], int] | None = None
    sharded: bool = True
    """Replicas share the optimizer's work and memory (ZeRO-1)."""
    overlap_reduce: bool = False
    overlap_gather: bool = False
    weights: Literal["folder", "new", "checkpoint"] = "folder"
    """Where the base's come from; a checkpoint's are filled in later."""
    trained: Path | None = None
    """Heads to begin with."""
    dtype: torch.dtype = torch.float32
    """Of weights that do not learn; those that do are float32."""


@dataclass
class Part:
    """What one rank holds of the model."""

    chunks: list[MedusaLlamaForCausalLM]
    buffers: list[FlatBuffer]
    """Its parameters that learn."""
    sharing: Sharing
    """How it shares rows with other ranks."""
    vocabulary: SharedVocabulary | None = None
    """How it shares `lm_head` with other ranks."""
    shards: dict[str, Shard] = field(default_factory=dict)
    """Which part of the whole its parameters are, by name."""

    @property
    def model(self) -> MedusaLlamaForCausalLM:
        """The last chunk, which on the last stage has the norm and all output layers."""
        return self.chunks[-1]

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by their names in a checkpoint; tied ones once."""
        found: dict[str, nn.Parameter] = {}
        for chunk in self.chunks:
            found.update(chunk.named_parameters())
        if self.chunks[0].config.tie_word_embeddings and LM_HEAD in found:
            found[EMBEDDING] = found.pop(LM_HEAD)
        return found


def parallelize(
    config: ModelConfig,
    folder: Path,
    heads: HeadShape,
    mesh: Mesh,
    plan: Plan,
    device: torch.device,
) -> Part:
    """Build this rank's part of the model in `folder` and say how its ranks work together.

    Args:
        heads: of the last stage; they begin as copies of the base's own prediction, or with what
            those at `plan.trained` have learnt.

    Raises:
        CheckpointError: the model's files are damaged or incomplete.
        ConfigError: a size that does not divide.
    """
    _check_root(config, heads, mesh, plan)

    # Pipeline: each stage holds its own layers; embedding first, norm, lm_head and heads last.
    # Interleaved, stage s of S has the layers of the virtual stages s, s + S, ...
    virtual = stage_layers(config.num_hidden_layers, mesh.pp * plan.chunks, plan.split)
    chunks = [
        skeleton(config, heads, mesh, virtual, number * mesh.pp + mesh.stage)
        for number in range(plan.chunks)
    ]

    # Tensor: heads, the MLP's width and the vocabulary are shared, within each layer.
    shared = Shared(mesh.tensor, sequence=plan.sequence)
    shards: dict[str, Shard] = {}
    if mesh.tp > 1:
        for chunk in chunks:
            _share_layers(chunk, shared)
            shards |= shared.shards(chunk)
        if config.tie_word_embeddings and LM_HEAD in shards:
            shards[EMBEDDING] = shards[LM_HEAD]  # its name in a checkpoint

    # Weights: each rank reads its own part.
    for chunk in chunks:
        _fill(chunk, folder, shards, plan, device)

    # Context: each rank has some of the rows, and sees the keys and values of all.
    if mesh.cp > 1:
        for chunk in chunks:
            for layer in chunk.model.layers:
                attention = layer.self_attn
                assert isinstance(attention, LlamaAttention)
                share_attention(attention, mesh.context)

    # Recomputing: of some layers only the input is kept for the backward.
    if plan.recompute is not None:
        for chunk in chunks:
            recompute(list(chunk.model.layers), *plan.recompute)

    # What learns; the rest keeps no gradient.
    learning = {
        name: parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if role_of(name) in plan.roles
    }

    # Tied embeddings are on two stages: their gradient is the sum over both ends of the pipeline.
    tied = {}
    if config.tie_word_embeddings and mesh.ends is not None:
        tied = {name: learning.pop(name) for name in (EMBEDDING, LM_HEAD) if name in learning}

    # What tensor parallel ranks have all of, they compute alike; where they share the rows, each
    # has its rows' part of the gradient.
    alike = {n: p for n, p in learning.items() if mesh.tp > 1 and n not in shards}
    parts = {n: learning.pop(n) for n in alike if plan.sequence and role_of(n) is Role.BASE}
    alike = {n: learning.pop(n) for n in alike if n not in parts}

    # Data parallel: whoever holds the same parameters adds up gradients and shares the update.
    buffers = [
        *_buffers(learning, mesh.replicas, plan),
        *_buffers(alike, mesh.replicas, plan, answers=mesh.tensor.index == 0),
        *_buffers(parts, mesh.same_stage, plan),
    ]
    if tied and mesh.ends is not None:
        (both,) = tied.values()
        buffers += _buffers({EMBEDDING: both}, mesh.ends, plan)
    for buffer in buffers:
        if plan.overlap_reduce:
            buffer.overlap_reduce()
    if plan.overlap_gather:
        _settle_in_time(chunks, buffers)

    part = Part(chunks, buffers, Sharing(mesh.context, mesh.tp if plan.sequence else 1))
    part.shards = shards
    if mesh.tp > 1 and mesh.last:
        part.vocabulary = _share_output(part.model, shards, mesh)
    return part


def _check_root(config: ModelConfig, heads: HeadShape, mesh: Mesh, plan: Plan) -> None:
    apart = mesh.pp > 1 and not config.tie_word_embeddings
    if heads.kind != "resblock" and Role.BASE in plan.roles and apart:
        raise ConfigError(
            f"--medusa_head_kind {heads.kind}: with medusa2 and an embedding that is not tied to "
            "lm_head, the last stage cannot see the embedding learn; use one stage or medusa1"
        )


def stage_layers(layers: int, stages: int, split: Sequence[int] | None) -> list[range]:
    """The layers of each stage. An even split gives what is left over to the first stages: the
    last one has the losses to compute as well."""
    if stages > layers:
        raise ConfigError(
            f"--pipeline_model_parallel_size {stages}: the model has only {layers} layers"
        )
    counts = split or [layers // stages + (stage < layers % stages) for stage in range(stages)]
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def skeleton(
    config: ModelConfig, heads: HeadShape, mesh: Mesh, virtual: Sequence[range], stage: int
) -> MedusaLlamaForCausalLM:
    """A (virtual) stage without weights."""
    last = stage == len(virtual) - 1
    with torch.device("meta"):
        return MedusaLlamaForCausalLM(
            config,
            heads if last else NO_HEADS,
            layers=virtual[stage],
            first=stage == 0,
            last=last,
        )


def _share_layers(chunk: MedusaLlamaForCausalLM, shared: Shared) -> None:
    """The plan of tensor parallel ranks for one chunk."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

    layer = "model.layers.*."
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": Vocabulary(shared),
        layer + "self_attn": Entered(shared),
        **{layer + f"self_attn.{name}_proj": Columns(shared) for name in "qkv"},
        layer + "self_attn.o_proj": Rows(shared),
        layer + "mlp": Entered(shared),
        layer + "mlp.gate_proj": Columns(shared),
        layer + "mlp.up_proj": Columns(shared),
        layer + "mlp.down_proj": Rows(shared),
        "model.norm": Whole(shared),
        "lm_head": Columns(shared),
    }
    ends = {"model.embed_tokens", "model.norm", "lm_head"}
    has = {name for name, _ in chunk.named_modules()}
    here = {name: style for name, style in plan.items() if name not in ends or name in has}
    group = shared.group.process_group
    assert group is not None
    parallelize_module(chunk, DeviceMesh.from_group(group, "cpu"), here)


def _share_output(
    model: MedusaLlamaForCausalLM, shards: Mapping[str, Shard], mesh: Mesh
) -> SharedVocabulary:
    shard = shards[LM_HEAD]
    if model.heads.kind != "resblock" and not hasattr(model, "root_embedding"):
        table = model.model.embed_tokens if hasattr(model.model, "embed_tokens") else model.lm_head
        model.embed_root = root_lookup(table, shard, mesh.tensor)  # type: ignore
    return SharedVocabulary(mesh.tensor, shard.start, -(-shard.size // mesh.tp))


def _fill(
    model: MedusaLlamaForCausalLM,
    folder: Path,
    shards: Mapping[str, Shard],
    plan: Plan,
    device: torch.device,
) -> None:
    """Give a skeleton its weights, frozen, and new float32 heads if it has some."""
    modules = model.medusa_head if model.heads.num_heads else None
    if modules is not None:
        del model.medusa_head  # the folder has no weights for them
    dtype = torch.float32 if Role.BASE in plan.roles else plan.dtype
    if plan.weights == "folder":
        load_weights(model, folder, None, dtype=dtype, device=device, cut=cut_to(shards))
    else:
        model.to_empty(device=device).to(dtype)
        both = hasattr(model.model, "embed_tokens") and hasattr(model, "lm_head")
        if both and model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
    if plan.weights == "new":
        _initialize(model, shards)
    if modules is not None:
        model.medusa_head = modules.to_empty(device=device)
        assert isinstance(model.lm_head, nn.Linear)
        begin_heads(model.medusa_head, model.heads, model.lm_head)
        if plan.trained is not None:
            go_on_from(model.medusa_head, model.heads, plan.trained)
    model.requires_grad_(False)


@torch.no_grad()
def _initialize(model: MedusaLlamaForCausalLM, shards: Mapping[str, Shard]) -> None:
    """Draw new weights, the same ones at any parallel layout (Megatron's standard deviations)."""
    layers = model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            known = EMBEDDING if name == LM_HEAD and model.config.tie_word_embeddings else name
            generator = torch.Generator().manual_seed(
                torch.initial_seed() + zlib.crc32(known.encode())
            )
            shard = shards.get(name)
            shape = list(parameter.shape)
            if shard is not None:
                shape[shard.dim] = shard.size
            ends_block = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = INITIAL_STD / (2 * layers) ** 0.5 if ends_block else INITIAL_STD
            drawn = torch.randn(shape, generator=generator) * std
            parameter.copy_(drawn if shard is None else shard.cut(drawn))


def _buffers(
    parameters: Mapping[str, nn.Parameter], group: object, plan: Plan, *, answers: bool = True
) -> list[FlatBuffer]:
    """One buffer, or several where messages are to overlap with computing."""
    bucket: dict[str, nn.Parameter] = {}
    buckets = [bucket]
    for name, parameter in parameters.items():
        if (plan.overlap_reduce or plan.overlap_gather) and _size(bucket) >= BUCKET:
            bucket = {}
            buckets.append(bucket)
        bucket[name] = parameter
    return [
        FlatBuffer(each, group, sharded=plan.sharded, answers=answers)  # type: ignore[arg-type]
        for each in buckets
        if each
    ]


def _size(parameters: Mapping[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


def _settle_in_time(
    chunks: Sequence[MedusaLlamaForCausalLM], buffers: Sequence[FlatBuffer]
) -> None:
    """Have each module wait for the buffers of its own parameters, and the norm for all: the
    losses behind it use weights without their modules."""
    owner = {p: buffer for buffer in buffers for p in buffer.parameters}
    for chunk in chunks:
        for module in chunk.modules():
            own = {owner[p] for p in module.parameters(recurse=False) if p in owner}
            if hasattr(chunk.model, "norm") and module is chunk.model.norm:
                own = set(buffers)
            for buffer in own:
                module.register_forward_pre_hook(lambda *_, buffer=buffer: buffer.settle())
