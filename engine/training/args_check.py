"""What has to agree between the arguments of a training run, and with the ranks. Free of torch."""

from __future__ import annotations

from engine.errors import ConfigError
from engine.training.args import TrainArguments
from engine.training.args_fields import show
from engine.training.self_cognition import make_names


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
