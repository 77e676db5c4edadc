"""From arguments to everything a rank needs for its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from engine.checkpoint.heads import HeadReader
from engine.checkpoint.sources import fetch
from engine.checkpoint.tokenizer import ensure_tokenizer
from engine.errors import CheckpointError, ConfigError
from engine.model.config import ModelConfig
from engine.model.medusa import NO_HEADS, HeadShape
from engine.text import TextCodec
from engine.training.args import TrainArguments, model_source
from engine.training.args_check import validate
from engine.training.args_resolve import shaped, with_model
from engine.training.checkpoint import Facts, Loader, check_fits, find
from engine.training.data import Samples, count_sequences, load_samples
from engine.training.hidden_cache import HiddenCache, cache_folder, data_digest
from engine.training.loss_scale import LossScale
from engine.training.mesh import Mesh, choose_device, join, make_mesh, world_size
from engine.training.objectives import Objective
from engine.training.optimizer import Optimizer, OptimizerOptions, Role
from engine.training.parallelize import Part, Plan, parallelize
from engine.training.pipeline import Pipeline
from engine.training.reading import RowStream
from engine.training.schedule import Schedule
from engine.training.template import Sample
from engine.training.vocabulary import Vocabulary, most_frequent

Tell = Callable[[str], None]


@dataclass
class Inputs:
    """What a run reads before its ranks meet; the same on each."""

    args: TrainArguments
    """With what the model says filled in."""
    config: ModelConfig
    folder: Path
    samples: Samples
    held_out: Sequence[Sample]
    """Rows for evaluation."""
    loader: Loader | None
    """The checkpoint to go on with."""
    total: int
    """Steps of the run."""
    vocabulary: Vocabulary | None
    heads: HeadShape
    trained: Path | None
    """Heads to begin with."""
    device: torch.device
    export_dtype: torch.dtype
    """Of the weights that the run leaves: the model's own."""
    notes: list[str]
    """What the user should know before the first step."""


@dataclass
class Session:
    """One rank of a run, ready for its steps."""

    inputs: Inputs
    mesh: Mesh
    objective: Objective
    part: Part
    pipeline: Pipeline
    optimizer: Optimizer
    loss_scale: LossScale
    schedules: dict[Role, Schedule]
    facts: Facts
    """Of the checkpoint that this run would write now."""
    cache: HiddenCache | None
    held_out_cache: HiddenCache | None


def read_inputs(args: TrainArguments) -> Inputs:
    """Read model config, data and checkpoint, and check that all fit.

    Raises:
        JupiterError: of the kind that fits, in one line.
    """
    validate(args, world_size())
    notes: list[str] = []
    tell = notes.append
    folder = fetch(model_source(args), tell)
    config = shaped(args, ModelConfig.from_folder(folder))
    device = choose_device()
    filled = with_model(args, config, folder)
    export_dtype = getattr(torch, filled.dtype)
    args = _choose_dtype(filled, args, device, tell)
    codec = TextCodec(folder, ensure_tokenizer(folder), config.eos_token_id)
    samples = load_samples(args, codec, "train", note=tell)
    held_out = load_samples(args, codec, "eval", note=tell) if args.eval_iters else []
    loader = open_checkpoint(args, tell)
    total = _steps(args, samples, loader)
    trained = None if args.medusa_head_path is None else fetch(args.medusa_head_path, tell)
    vocabulary = _vocabulary(args, config, samples, loader, trained, device)
    heads = head_shape(args, config, vocabulary)
    return Inputs(
        args=args,
        config=config,
        folder=folder,
        samples=samples,
        held_out=held_out,
        loader=loader,
        total=total,
        vocabulary=vocabulary,
        heads=heads,
        trained=trained,
        device=device,
        export_dtype=export_dtype,
        notes=notes,
    )


def prepare(args: TrainArguments) -> Session:
    """Read everything, join the other ranks, restore a checkpoint; every rank calls this.

    Raises:
        JupiterError: of the kind that fits, in one line.
    """
    torch.manual_seed(args.seed)
    if args.deterministic_mode:
        torch.use_deterministic_algorithms(True)
    inputs = read_inputs(args)
    args, config, folder = inputs.args, inputs.config, inputs.folder
    facts = _facts(inputs)
    if inputs.loader is not None:
        check_fits(inputs.loader, facts, weights_only=args.finetune)
    join(args.distributed_backend, args.distributed_timeout_minutes)
    mesh = make_mesh(
        args.pipeline_model_parallel_size,
        args.tensor_model_parallel_size,
        args.context_parallel_size,
        saving=args.async_save,
    )
    _agree_on_data(mesh, facts.data)
    dtype = getattr(torch, args.dtype)
    part = parallelize(config, folder, inputs.heads, mesh, _plan(inputs), inputs.device)
    overlap = args.overlap_param_gather and args.use_distributed_optimizer
    optimizer = Optimizer(part.buffers, _optimizer_options(args), overlap_gather=overlap)
    loss_scale = LossScale(enabled=args.dtype == "float16")
    if inputs.loader is not None:
        facts = _restore(inputs, inputs.loader, part, optimizer, loss_scale, facts, mesh)
    objective = Objective(
        args.objective,
        args.head_weights if args.command == "medusa" else (),
        inputs.vocabulary,
        part.sharing,
        part.vocabulary,
        soft=args.medusa_soft_targets if args.command == "medusa" else 0.0,
    )
    return Session(
        inputs=inputs,
        mesh=mesh,
        objective=objective,
        part=part,
        pipeline=Pipeline(part.chunks, mesh, inputs.device, dtype, args.pipeline_schedule),
        optimizer=optimizer,
        loss_scale=loss_scale,
        schedules=make_schedules(args, inputs.total),
        facts=facts,
        cache=_cache(inputs, inputs.samples, objective),
        held_out_cache=_cache(inputs, inputs.held_out, objective),
    )


def _plan(inputs: Inputs) -> Plan:
    """What the arguments say about how the work is spread."""
    args, loader = inputs.args, inputs.loader
    learning = {
        "medusa1": frozenset({Role.HEADS}),
        "medusa2": frozenset(Role),
        "sft": frozenset({Role.BASE}),
        "pt": frozenset({Role.BASE}),
    }
    weights: Literal["folder", "new", "checkpoint"] = "new" if args.from_scratch else "folder"
    if loader is not None and loader.has_base and args.command != "medusa":
        weights = "checkpoint"
    return Plan(
        roles=learning[args.objective],
        split=args.stage_num_hidden_layers_list,
        chunks=args.pipeline_chunks,
        sequence=args.sequence_parallel and args.tensor_model_parallel_size > 1,
        recompute=args.recompute,
        sharded=args.use_distributed_optimizer,
        overlap_reduce=args.overlap_grad_reduce,
        overlap_gather=args.overlap_param_gather and args.use_distributed_optimizer,
        weights=weights,
        trained=inputs.trained,
        dtype=getattr(torch, args.dtype),
    )


def _choose_dtype(
    args: TrainArguments, given: TrainArguments, device: torch.device, tell: Tell
) -> TrainArguments:
    """On a CPU the model's own half precision is slower than float32: only where asked for."""
    if device.type != "cpu":
        return args
    if args.bf16 and given.bf16 is None:
        tell("computing in float32, which is faster on a CPU than bfloat16 (--bf16 true for that)")
        return dataclasses.replace(args, bf16=False)
    if args.fp16 and given.fp16 is None:
        tell("computing in float32, which is faster on a CPU than float16 (--fp16 true for that)")
        return dataclasses.replace(args, fp16=False)
    return args


def open_checkpoint(args: TrainArguments, tell: Tell) -> Loader | None:
    """The checkpoint that `load` names; None where there is none.

    Raises:
        CheckpointError: it holds none, unless `exit_on_missing_checkpoint` is off.
    """
    if args.load is None:
        return None
    try:
        wanted = None if args.auto_detect_ckpt_format else args.ckpt_format
        return Loader(find(Path(args.load).expanduser()), wanted)
    except CheckpointError as error:
        if args.exit_on_missing_checkpoint:
            raise
        tell(f"beginning anew: {error}")
        return None


def _steps(args: TrainArguments, samples: Samples, loader: Loader | None) -> int:
    total = args.iterations(count_sequences(samples, args) or 0)  # a stream needs train_iters
    if loader is not None and not args.finetune and loader.facts.iteration >= total:
        raise ConfigError(
            f"--train_iters {total}: the checkpoint {loader.folder} is at step "
            f"{loader.facts.iteration} already"
        )
    return total


def _vocabulary(
    args: TrainArguments,
    config: ModelConfig,
    samples: Samples,
    loader: Loader | None,
    trained: Path | None,
    device: torch.device,
) -> Vocabulary | None:
    """The heads' vocabulary: that of the checkpoint or heads begun with, or else the data's."""
    if args.truncated_vocab_size is None or isinstance(samples, RowStream):
        return None
    if loader is not None:
        ids = loader.vocabulary()
    else:
        ids = None if trained is None else HeadReader(trained).token_map
    if ids is None or len(ids) != args.truncated_vocab_size:
        ids = most_frequent(samples, config.vocab_size, args.truncated_vocab_size)
    return Vocabulary(ids.to(device), config.vocab_size)


def head_shape(
    args: TrainArguments, config: ModelConfig, vocabulary: Vocabulary | None
) -> HeadShape:
    """What the heads are made of; there are none where the model itself is trained."""
    if args.command != "medusa":
        return NO_HEADS
    rows, token_map = None, None
    if not args.original_lm_head:
        rows = config.vocab_size
        if vocabulary is not None:
            token_map = tuple(vocabulary.ids.tolist())
            rows = len(token_map)
    inner = args.medusa_inner_size or 2 * config.hidden_size
    return HeadShape(
        args.medusa_num_heads,
        args.medusa_num_layers,
        rows,
        token_map,
        args.medusa_head_kind,
        0 if args.medusa_head_kind == "resblock" else inner,
    )


def _facts(inputs: Inputs) -> Facts:
    """Of the beginning of a run."""
    config = inputs.config
    if inputs.args.command != "medusa":
        made_of: dict[str, Any] = {}
    else:
        made_of = {
            "medusa_num_heads": inputs.heads.num_heads,
            "medusa_num_layers": inputs.heads.num_layers,
            "medusa_head_kind": inputs.heads.kind,
            "medusa_inner_size": inputs.heads.inner_size,
            "original_lm_head": inputs.heads.vocab_size is None,
            "truncated_vocab_size": inputs.args.truncated_vocab_size,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
        }
    return Facts(
        iteration=0,
        consumed_samples=0,
        world_size=world_size(),
        objective=inputs.args.objective,
        heads=made_of,
        data=data_digest(inputs.samples),
    )


def _agree_on_data(mesh: Mesh, digest: str) -> None:
    """All ranks must have read the same rows: each computes its part from its own copy."""
    number = int(digest, 16) >> 1  # int64
    both = torch.tensor([number, -number])
    high, low = mesh.world.max_(both.clone()).tolist()
    if high != -low:
        raise ConfigError("--dataset: the machines of this run have different data files")


def _optimizer_options(args: TrainArguments) -> OptimizerOptions:
    names = [field.name for field in dataclasses.fields(OptimizerOptions)]
    return OptimizerOptions(**{name: getattr(args, name) for name in names})


def _restore(
    inputs: Inputs,
    loader: Loader,
    part: Part,
    optimizer: Optimizer,
    loss_scale: LossScale,
    facts: Facts,
    mesh: Mesh,
) -> Facts:
    """Go on from a checkpoint; returns where the run is now."""
    args, tell = inputs.args, inputs.notes.append
    loader.restore(
        part,
        optimizer,
        inputs.config,
        weights_only=args.finetune,
        states=not args.no_load_optim,
    )
    if args.finetune:
        tell(f"taking the weights of {loader.folder}")
        return facts
    if not args.no_load_optim:
        loss_scale.restore(loader.loss_scale())
    if not args.no_load_rng:
        loader.restore_random(mesh.world)
    if loader.facts.data != facts.data:
        tell(f"the data is not that of {loader.folder}: its order cannot be continued exactly")
    tell(f"going on from {loader.folder}")
    return dataclasses.replace(
        facts,
        iteration=loader.facts.iteration,
        consumed_samples=loader.facts.consumed_samples,
    )


def make_schedules(args: TrainArguments, total: int) -> dict[Role, Schedule]:
    """The learning rate's course of each role. The base's begins when it joins the heads."""
    decay = args.lr_decay_iters or total
    share, joins = args.lowest_share, args.medusa_warmup_iters

    def course(highest: float, iters: int) -> Schedule:
        return Schedule(highest, iters, args.lr_decay_style, args.lr_warmup_iters, highest * share)

    return {
        Role.HEADS: course(args.medusa_lr, decay),
        Role.BASE: course(args.lr, max(1, decay - joins)),
    }


def _cache(inputs: Inputs, samples: Samples, objective: Objective) -> HiddenCache | None:
    setting = inputs.args.cache_hidden_states
    if setting is None or isinstance(samples, RowStream) or not samples:
        return None
    place = cache_folder(
        setting, inputs.folder, samples, objective.looks, int8=inputs.args.load_in_8bit
    )
    return HiddenCache(place, samples, objective.looks, inputs.config.hidden_size)
