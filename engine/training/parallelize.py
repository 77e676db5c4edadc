"""The parallel plan of a run: what each rank holds, what it updates, and with whom.

All of it is in `parallelize`. The model itself knows nothing of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from engine.checkpoint.load import EMBEDDING, LM_HEAD, load_weights
from engine.errors import ConfigError
from engine.model.config import ModelConfig
from engine.model.medusa import HeadShape, MedusaLlamaForCausalLM
from engine.training.begin_heads import begin_heads, go_on_from
from engine.training.flat import FlatBuffer
from engine.training.mesh import Mesh
from engine.training.optimizer import Role, role_of


@dataclass
class Part:
    """What one rank holds of the model."""

    model: MedusaLlamaForCausalLM
    buffers: list[FlatBuffer]
    """Its parameters that learn."""


def parallelize(
    config: ModelConfig,
    folder: Path,
    heads: HeadShape,
    mesh: Mesh,
    *,
    split: Sequence[int] | None,
    roles: frozenset[Role],
    sharded: bool,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    trained: Path | None = None,
) -> Part:
    """Build this rank's part of the model in `folder` and say how its ranks work together.

    Args:
        heads: of the last stage; they begin as copies of the base's own prediction, or with
            what those at `trained` have learnt.
        split: layers per stage; None splits evenly.
        roles: what learns.
        sharded: replicas share the optimizer's work and memory (ZeRO-1).
        dtype: of weights that do not learn; those that do are float32.

    Raises:
        CheckpointError: the model's files are damaged or incomplete.
        ConfigError: more stages than layers.
    """
    # Pipeline: each stage holds its own layers; embedding first, norm, lm_head and heads last.
    layers = stage_layers(config.num_hidden_layers, mesh.pp, split)[mesh.stage]
    if (
        heads.kind != "resblock"
        and Role.BASE in roles
        and mesh.pp > 1
        and not config.tie_word_embeddings
    ):
        raise ConfigError(
            f"--medusa_head_kind {heads.kind}: with medusa2 and an embedding that is not tied to "
            "lm_head, the last stage cannot see the embedding learn; use one stage or medusa1"
        )
    base_dtype = torch.float32 if Role.BASE in roles else dtype
    model = build(config, folder, heads, layers, mesh, device, base_dtype, trained)

    # What learns; the rest keeps no gradient.
    learning = {
        name: parameter for name, parameter in model.named_parameters() if role_of(name) in roles
    }

    # Tied embeddings are on two stages: their gradient is the sum over both ends of the pipeline.
    tied = {}
    if config.tie_word_embeddings and mesh.ends is not None:
        tied = {name: learning.pop(name) for name in (EMBEDDING, LM_HEAD) if name in learning}

    # Data parallel: whoever holds the same parameters adds up gradients and shares the update.
    buffers = [FlatBuffer(learning, mesh.replicas, sharded=sharded)]
    if tied and mesh.ends is not None:
        (shared,) = tied.values()
        buffers.append(FlatBuffer({EMBEDDING: shared}, mesh.ends, sharded=sharded))
    return Part(model, buffers)


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


def build(
    config: ModelConfig,
    folder: Path,
    heads: HeadShape,
    layers: range,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
    trained: Path | None = None,
) -> MedusaLlamaForCausalLM:
    """A stage with its weights in `dtype`, frozen, and float32 heads if it is the last.

    They are new, or go on from those at `trained`.
    """
    with torch.device("meta"):
        model = MedusaLlamaForCausalLM(
            config, heads, layers=layers, first=mesh.first, last=mesh.last
        )
    modules = model.medusa_head if mesh.last and heads.num_heads else None
    if modules is not None:
        del model.medusa_head  # the folder has no weights for them
    load_weights(model, folder, None, dtype=dtype, device=device)
    if modules is not None:
        model.medusa_head = modules.to_empty(device=device)
        assert isinstance(model.lm_head, nn.Linear)
        begin_heads(model.medusa_head, heads, model.lm_head)
        if trained is not None:
            go_on_from(model.medusa_head, heads, trained)
    return model.requires_grad_(False)
