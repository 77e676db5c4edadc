"""From a config to a stage with its weights: what every rank does before it joins the others."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint.head_choices import best_choices, read_acceptance
from engine.checkpoint.load import load_weights
from engine.checkpoint.preflight import find_heads, preflight
from engine.config import JupiterConfig
from engine.decoding.acceptance import Acceptance
from engine.decoding.tree import Tree, choose_tree
from engine.decoding.tuner import Drafting, FixedTree, TreeTuner
from engine.errors import ConfigError
from engine.kernels.build import NoKernelsError, must_compile
from engine.kernels.forward import NativeForward
from engine.model.config import ModelConfig
from engine.model.medusa import (
    NO_HEADS,
    HeadShape,
    MedusaLlamaForCausalLM,
    cut_draft_vocabulary,
    fuse_projections,
)
from engine.model.quantize import quantize_model
from engine.pipeline.batch import Entry, Judge
from engine.pipeline.group import neighbours
from engine.pipeline.stage import Stage

WARM_ROWS = 2
# A layer that makes no progress for so long hangs: at least, and as a multiple of the time that it
# would take for the longest chunk if each row cost as much as one of few.
PATIENCE_S = 2.0
PATIENCE = 3


@dataclass
class Plan:
    """What all ranks agree on, read from the config and the checkpoint alone."""

    config: JupiterConfig
    folder: Path
    model: ModelConfig
    heads: HeadShape
    heads_path: Path | None
    tree: Tree
    """The draft tree; where it is tuned, one as large as it may get."""
    acceptance: Acceptance | None
    """Counts stored beside the heads."""
    context_length: int
    dtype: torch.dtype

    @property
    def tuned(self) -> bool:
        """The tree follows what is measured."""
        return self.config.medusa_choices == "auto" and self.heads.num_heads > 0

    def drafting(self) -> Drafting:
        """Where rank 0 has its trees from: a new tuner, or the tree that the config names."""
        sequential = self.heads.kind == "hydra"
        if self.tuned:
            return TreeTuner(self.heads.num_heads, self.acceptance, sequential=sequential)
        return FixedTree(self.tree, sequential=sequential)

    def layers(self, rank: int) -> range:
        """The decoder layers of a stage, by their numbers in the whole model."""
        counts = self.config.stage_num_hidden_layers_list
        first = sum(counts[:rank])
        return range(first, first + counts[rank])


def make_plan(config: JupiterConfig, folder: Path) -> Plan:
    """Check the config against the checkpoint in `folder` and read the heads' shape.

    Raises ConfigError or CheckpointError.
    """
    model = preflight(config, folder)
    found = find_heads(config, folder)
    heads, heads_path, acceptance = NO_HEADS, None, None
    if found is not None:
        heads_path, spec = found
        heads = HeadShape(
            spec.num_heads,
            spec.num_layers,
            spec.vocab_size,
            spec.token_map,
            spec.kind,
            spec.inner_size,
        )
        acceptance = read_acceptance(heads_path)
    return Plan(
        config=config,
        folder=folder,
        model=model,
        heads=heads,
        heads_path=heads_path,
        tree=choose_tree(
            config.medusa_choices,
            heads.num_heads,
            best_choices(acceptance) if acceptance else None,
        ),
        acceptance=acceptance,
        context_length=min(config.max_kv_cache_length, model.context_limit),
        dtype=getattr(torch, config.torch_dtype),
    )


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device of a rank: its local rank modulo the device count on CUDA.

    Raises ConfigError where the config asks for CUDA and torch sees none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"key 'device': '{name}', but torch sees no GPU; use \"cpu\" or \"auto\"")
    if ":" in name:
        return torch.device(name)
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def build_stage(
    plan: Plan, rank: int, device: torch.device, progress: Callable[[int, int], None]
) -> Stage:
    """The stage of `rank` with its own tensors only, on its device and warmed up.

    `progress` is called with the number of tensors loaded and their total.
    """
    world = plan.config.world_size
    first, last = rank == 0, rank == world - 1
    with torch.device("meta"):
        model = MedusaLlamaForCausalLM(
            plan.model, plan.heads, layers=plan.layers(rank), first=first, last=last
        )
    load_weights(
        model,
        plan.folder,
        plan.heads_path if last else None,
        dtype=plan.dtype,
        device=device,
        progress=progress,
    )
    model.eval().requires_grad_(False)
    fuse_projections(model)
    cut_draft_vocabulary(model)
    if plan.config.weight_bits is not None:
        quantize_model(model, plan.config.weight_bits, device)
    stage = Stage(
        model,
        first=first,
        last=last,
        context_length=plan.context_length,
        dtype=plan.dtype,
        device=device,
        forward=_native(model, plan, device),
        neighbours=neighbours(plan.config, device),
    )
    for _ in range(2):  # the first one sets up what torch sets up on first use
        seconds = _warm_up(stage, plan.model.hidden_size)
    slowest = seconds / len(plan.layers(rank)) * plan.config.max_sub_sequence_len / WARM_ROWS
    stage.patience_s = max(PATIENCE_S, PATIENCE * slowest)
    return stage


def will_compile(plan: Plan, device: torch.device) -> bool:
    """Building a stage will take some seconds longer, for kernels that are not there yet."""
    return _wants_kernels(plan, device) and must_compile()


def _wants_kernels(plan: Plan, device: torch.device) -> bool:
    return plan.config.weight_bits == 8 and device.type == "cpu" and plan.dtype == torch.float32


def _native(
    model: MedusaLlamaForCausalLM, plan: Plan, device: torch.device
) -> NativeForward | None:
    """The compiled kernels for an int8 stage on a CPU, where this machine can have them."""
    if not _wants_kernels(plan, device):
        return None
    threads = torch.get_num_threads()
    try:
        native = NativeForward(model, threads)
    except NoKernelsError as error:
        print(f"compiled kernels are not used: {error}", file=sys.stderr)
        return None
    # What is left for torch is small: waking its threads would take longer than the work.
    torch.set_num_threads(1)
    return native


def _warm_up(stage: Stage, hidden_size: int) -> float:
    """One step, so that the first request does not pay for it; the seconds of its layers."""
    parents = range(-1, WARM_ROWS - 1)
    entry = Entry(0, 0, tokens=[0] * WARM_ROWS, parents=list(parents), judge=Judge.LAST)
    hidden = None
    if not stage.first:
        hidden = torch.zeros(WARM_ROWS, hidden_size, dtype=stage.dtype, device=stage.device)
    began = time.perf_counter()
    out = stage.run([entry], hidden)
    seconds = time.perf_counter() - began
    if stage.last:
        stage.judge([entry], out)
    return seconds
