"""`TrainArguments`: everything a training run is told; see docs/training.md. Free of torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.config import load_config
from engine.errors import ConfigError
from engine.training.args_fields import Argument, arguments, show
from engine.training.args_medusa import Layout, Medusa, SelfDistillation
from engine.training.args_model import Model
from engine.training.args_parse import parse
from engine.training.args_run import Checkpoint, Distributed, Logging, Run
from engine.training.args_training import (
    Evaluation,
    LearningRate,
    MixedPrecision,
    Regularization,
    Training,
)
from engine.training.self_cognition import make_names

GROUPS: tuple[tuple[str, type], ...] = (
    ("Data and run", Run),
    ("Medusa", Medusa),
    ("Self-distillation", SelfDistillation),
    ("Training", Training),
    ("Learning rate", LearningRate),
    ("Regularization", Regularization),
    ("Checkpoint", Checkpoint),
    ("Distributed", Distributed),
    ("Logging", Logging),
    ("Evaluation", Evaluation),
    ("Mixed precision", MixedPrecision),
    ("Model", Model),
)
MEDUSA_GROUPS = ("Medusa", "Self-distillation")
HEAD_DECAY = 0.8
COMMAND = "command"
"""In args.json: whose arguments they are."""
Command = Literal["medusa", "sft", "pt"]


def groups_of(command: Command) -> tuple[tuple[str, type], ...]:
    """The groups of arguments that a command has."""
    if command == "medusa":
        return GROUPS
    return tuple(group for group in GROUPS if group[0] not in MEDUSA_GROUPS)


def arguments_of(command: Command) -> dict[str, Argument]:
    """The arguments that a command has, by name."""
    return {name: a for _, cls in groups_of(command) for name, a in arguments(cls).items()}


@dataclass(frozen=True, kw_only=True)
class TrainArguments(
    Run,
    Medusa,
    SelfDistillation,
    Training,
    LearningRate,
    Regularization,
    Checkpoint,
    Distributed,
    Logging,
    Evaluation,
    MixedPrecision,
    Model,
):
    """All argument groups in one; `args_resolve.with_model` fills in what is the model's to say."""

    given: frozenset[str] = field(default=frozenset(), compare=False)
    """Names of the arguments that the user gave."""
    command: Command = "medusa"
    """What is trained: heads, or the model on answers (sft) or on whole texts (pt)."""

    @property
    def objective(self) -> Literal["medusa1", "medusa2", "sft", "pt"]:
        """What is learnt."""
        return self.medusa_objective if self.command == "medusa" else self.command

    @property
    def dtype(self) -> str:
        """What is computed with: "float32", "bfloat16" or "float16"."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    @property
    def from_scratch(self) -> bool:
        """Whether the model begins with new weights."""
        return not self.no_initialization

    @property
    def model_parts(self) -> int:
        """Ranks that together hold one replica of the model and its sequences."""
        return (
            self.pipeline_model_parallel_size
            * self.tensor_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def pipeline_chunks(self) -> int:
        """Parts of the layers that each pipeline stage has."""
        if self.pipeline_schedule != "interleaved":
            return 1
        return self.virtual_pipeline_model_parallel_size or 2

    @property
    def recompute(self) -> tuple[Literal["uniform", "block"], int] | None:
        """How layers are computed again: the method, and its number of layers."""
        if self.recompute_granularity != "full":
            return None
        return self.recompute_method or "uniform", self.recompute_num_layers or 1

    @property
    def layout(self) -> Layout:
        """Layout in which the heads are written."""
        if self.heads_layout is not None:
            return self.heads_layout
        if self.medusa_head_kind != "resblock":
            return "jupiter"
        return "v2" if self.original_lm_head else "fasterdecoding"

    @property
    def head_weights(self) -> tuple[float, ...]:
        """Weight of each head's loss."""
        given = self.medusa_head_weights
        return tuple(given or (HEAD_DECAY**head for head in range(self.medusa_num_heads)))

    @property
    def lowest_share(self) -> float:
        """The lowest learning rate over the highest, for all that learns."""
        return self.min_lr / (self.medusa_lr if self.objective == "medusa1" else self.lr)

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model among `world_size` ranks."""
        return world_size // self.model_parts

    def accumulation_steps(self, dp_size: int) -> int:
        """Micro-batches of each rank in one step."""
        return self.global_batch_size // (self.micro_batch_size * dp_size)

    def iterations(self, num_sequences: int) -> int:
        """Steps of the run, for an epoch of so many sequences."""
        if self.train_iters is not None:
            return self.train_iters
        epochs = self.num_train_epochs or 1.0
        return max(1, math.ceil(epochs * num_sequences / self.global_batch_size))


def parse_arguments(words: Sequence[str], command: Command = "medusa") -> TrainArguments:
    """The arguments of a training command.

    Args:
        words: what follows the command; the first may be a JSON or YAML file of arguments.

    Raises:
        ConfigError: one line that names the argument and what would be right.
    """
    args, given = parse(words, TrainArguments, noted=(COMMAND,))
    for name in sorted(given - arguments_of(command).keys()):
        raise ConfigError(f"--{name}: belongs to jupiter medusa; jupiter {command} trains no heads")
    args = dataclasses.replace(args, given=given, command=command)
    if not args.dataset and args.generate is None:
        raise ConfigError(f"--dataset: name the data files; see jupiter {command} --help")
    return args


def validate(args: TrainArguments, world_size: int) -> None:
    """Check the arguments against each other and the number of ranks.

    Raises:
        ConfigError: what does not fit, with the numbers.
    """
    _check_sizes(args, world_size)
    _check_pipeline(args, world_size)
    _check_schedule(args)
    _check_together(args)
    _check_data(args)
    if args.command == "medusa":
        _check_medusa(args)
    if args.val_dataset and "split_dataset_ratio" in args.given and args.split_dataset_ratio:
        raise ConfigError(
            "--split_dataset_ratio: rows for evaluation are in --val_dataset; give one"
        )


def _check_sizes(args: TrainArguments, world_size: int) -> None:
    names = ("pipeline", "tensor", "context")
    sizes = {
        name: getattr(args, f"{name}_{'' if name == 'context' else 'model_'}parallel_size")
        for name in names
    }
    if world_size % args.model_parts:
        first = next(name for name in names if sizes[name] > 1)
        option = f"{first}_{'' if first == 'context' else 'model_'}parallel_size"
        others = " × ".join(f"{name} {size}" for name, size in sizes.items())
        product = "" if args.model_parts == sizes[first] else f" ({others} = {args.model_parts})"
        raise ConfigError(
            f"--{option} {sizes[first]}{product}: does not divide the {world_size} "
            f"{'process' if world_size == 1 else 'processes'} (NPROC_PER_NODE × NNODES)"
        )
    dp_size = args.data_parallel_size(world_size)
    together = args.micro_batch_size * dp_size
    if args.global_batch_size % together:
        raise ConfigError(
            f"--global_batch_size {args.global_batch_size}: is no multiple of {together} = "
            f"micro_batch_size {args.micro_batch_size} × data-parallel size {dp_size}"
        )


def _check_pipeline(args: TrainArguments, world_size: int) -> None:
    stages, chunks = args.pipeline_model_parallel_size, args.pipeline_chunks
    split = args.stage_num_hidden_layers_list
    if split is not None and len(split) != stages * chunks:
        virtual = f" × {chunks} parts each" if chunks > 1 else ""
        raise ConfigError(
            f"--stage_num_hidden_layers_list {show(split)}: names {len(split)} stages, "
            f"but pipeline_model_parallel_size is {stages}{virtual}"
        )
    if args.pipeline_schedule != "interleaved":
        if (size := args.virtual_pipeline_model_parallel_size) is not None:
            raise ConfigError(
                f"--virtual_pipeline_model_parallel_size {size}: goes with "
                "pipeline_schedule interleaved"
            )
        return
    if stages == 1:
        raise ConfigError(
            "--pipeline_schedule interleaved: needs a pipeline_model_parallel_size above 1"
        )
    steps = args.accumulation_steps(args.data_parallel_size(world_size))
    if steps % stages:
        raise ConfigError(
            f"--pipeline_schedule interleaved: the {steps} micro-batches of a step are no "
            f"multiple of pipeline_model_parallel_size {stages}"
        )


def _check_together(args: TrainArguments) -> None:
    if args.fp16 and args.bf16:
        raise ConfigError("--fp16: bf16 is given too; give one")
    if args.recompute_granularity != "full":
        for name in ("recompute_method", "recompute_num_layers"):
            if getattr(args, name) is not None:
                value = show(getattr(args, name))
                raise ConfigError(f"--{name} {value}: goes with recompute_granularity full")
    if args.async_save and args.ckpt_format != "torch_dist":
        raise ConfigError(f"--async_save: goes with ckpt_format torch_dist, not {args.ckpt_format}")


def _check_schedule(args: TrainArguments) -> None:
    if args.train_iters is not None and args.num_train_epochs is not None:
        raise ConfigError("--num_train_epochs: train_iters says the length already; give one")
    name = "medusa_lr" if args.objective == "medusa1" else "lr"
    if args.lowest_share > 1:
        highest = show(getattr(args, name))
        raise ConfigError(f"--min_lr {show(args.min_lr)}: is above {name} {highest}")
    last = args.lr_decay_iters or args.train_iters
    if last is not None and args.lr_warmup_iters > last:
        raise ConfigError(
            f"--lr_warmup_iters {args.lr_warmup_iters}: is more than the {last} steps in which "
            "the rate reaches its lowest"
        )


def _check_data(args: TrainArguments) -> None:
    make_names(args.model_name, args.model_author)
    if args.lazy_tokenize and args.packing:
        raise ConfigError("--lazy_tokenize: packing has to know how long the rows are; give one")
    if not args.streaming:
        return
    if args.train_iters is None:
        raise ConfigError("--streaming: give --train_iters; a stream does not know its length")
    if args.split_dataset_ratio and "split_dataset_ratio" in args.given:
        raise ConfigError(
            "--split_dataset_ratio: nothing can be drawn from a stream; give --val_dataset"
        )
    for name in ("cache_hidden_states", "truncated_vocab_size"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name}: has to see all rows before the run; not with streaming")


def _check_medusa(args: TrainArguments) -> None:
    _check_heads_layout(args)
    shared = args.tensor_model_parallel_size > 1
    if args.cache_hidden_states is not None and (shared or args.context_parallel_size > 1):
        raise ConfigError(
            "--cache_hidden_states: goes with replicas and pipeline stages only, "
            "not with tensor or context parallel ranks"
        )
    for name, given in (
        ("original_lm_head false", not args.original_lm_head),
        (f"truncated_vocab_size {args.truncated_vocab_size}", args.truncated_vocab_size),
        (f"medusa_soft_targets {show(args.medusa_soft_targets)}", args.medusa_soft_targets),
    ):
        if given and shared:
            raise ConfigError(
                f"--{name}: the output layer would have to be shared; "
                "give --tensor_model_parallel_size 1"
            )
    if args.medusa_soft_targets and args.context_parallel_size > 1:
        raise ConfigError("--medusa_soft_targets: not with context parallel ranks")
    weights = args.medusa_head_weights
    if weights is not None and len(weights) != args.medusa_num_heads:
        raise ConfigError(
            f"--medusa_head_weights {show(weights)}: {len(weights)} weights for "
            f"{args.medusa_num_heads} heads"
        )
    if args.medusa_objective == "medusa2" and args.cache_hidden_states is not None:
        raise ConfigError("--cache_hidden_states: with medusa2 the base learns, so they change")
    if args.load_in_8bit and args.cache_hidden_states is None:
        raise ConfigError("--load_in_8bit: goes with cache_hidden_states")
    if args.load_in_8bit and args.pipeline_model_parallel_size > 1:
        raise ConfigError("--load_in_8bit: the int8 base is on one stage")
    if args.medusa_objective == "medusa2" and args.medusa_soft_targets:
        raise ConfigError("--medusa_soft_targets: with medusa2 the base learns, so they change")


def _check_heads_layout(args: TrainArguments) -> None:
    if args.medusa_head_kind != "resblock" and args.layout != "jupiter":
        raise ConfigError(
            f"--heads_layout {args.layout}: {args.medusa_head_kind} heads need heads_layout jupiter"
        )
    if args.layout == "v2" and not args.original_lm_head:
        raise ConfigError("--heads_layout v2: holds heads that share lm_head only")
    if args.layout == "fasterdecoding" and args.original_lm_head:
        raise ConfigError(
            "--heads_layout fasterdecoding: each head has an output layer in it; "
            "set original_lm_head false, or use v2 or vllm"
        )
    own_part = args.truncated_vocab_size is not None and not args.original_lm_head
    if own_part and args.layout not in ("vllm", "jupiter"):
        raise ConfigError(
            f"--truncated_vocab_size {args.truncated_vocab_size}: output layers over a part of "
            "the vocabulary need heads_layout vllm or jupiter"
        )


def notes(args: TrainArguments) -> list[str]:
    """What to tell once before the run: arguments that were given and have no effect here."""
    known = arguments(TrainArguments)
    told = []
    for name in sorted(args.given, key=list(known).index):
        instead = known[name].instead or _without_effect(args, name)
        if instead is not None:
            told.append(f"--{name} has no effect here: {instead}")
    return told


def _without_effect(args: TrainArguments, name: str) -> str | None:
    """Why an argument says nothing beside the others that were given."""
    if args.objective == "medusa1":
        if name == "lr":
            return "with medusa1 the base stays as it is; the heads learn at medusa_lr"
        if name == "medusa_warmup_iters":
            return "with medusa1 the heads always learn alone"
    if args.streaming and name in ("lazy_tokenize", "dataset_num_proc"):
        return "a stream is tokenized as it is read"
    if args.lazy_tokenize and name == "dataset_num_proc":
        return "each row is tokenized when it is its turn"
    if name == "num_workers" and not (args.lazy_tokenize or args.streaming):
        return "rows are tokenized before the first step, so none has to be waited for"
    if name == "medusa_inner_size" and args.medusa_head_kind == "resblock":
        return "medusa_head_kind is resblock"
    if name.startswith("adam_") and args.optimizer != "adam":
        return f"the optimizer is {args.optimizer}"
    if name == "sgd_momentum" and args.optimizer != "sgd":
        return f"the optimizer is {args.optimizer}"
    if name == "lr_decay_iters" and args.lr_decay_style == "constant":
        return "lr_decay_style is constant"
    if name in ("no_load_optim", "no_load_rng", "finetune") and args.load is None:
        return "there is no load"
    if name == "sequence_parallel" and args.tensor_model_parallel_size == 1:
        return "tensor_model_parallel_size is 1"
    if name == "overlap_param_gather" and not args.use_distributed_optimizer:
        return "without the distributed optimizer every rank updates all weights itself"
    if name == "manual_gc_interval" and not args.manual_gc:
        return "it goes with manual_gc"
    if name in arguments(SelfDistillation) and args.generate is None:
        return "it goes with generate"
    return None


def model_source(args: TrainArguments) -> str:
    """The base model: `model`, else what `load` says of it, else that of Jupiter's config.

    Raises ConfigError.
    """
    if args.model is None and args.load is not None:
        load = Path(args.load).expanduser()
        for folder in (load, load.parent):
            if (folder / "config.json").is_file():
                return str(folder)
    return args.model or load_config(args.config).base_model_name_or_path


def as_json(args: TrainArguments) -> dict[str, Any]:
    """The arguments by name, for args.json; `parse_arguments` reads such a file."""
    values = {name: getattr(args, name) for name in arguments_of(args.command)}
    return {COMMAND: args.command, **values}
