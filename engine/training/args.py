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
from engine.training.args_fields import Argument, arguments
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
