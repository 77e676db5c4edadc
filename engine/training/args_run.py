"""Arguments of where a run runs, what it writes and what it reads: Megatron-SWIFT's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.training.args_fields import Positive, PositiveInt, Share, arg

ProgressMode = Literal["auto", "json", "none"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is saved and what is gone on with."""

    save: str | None = arg(
        None, "folder of the run folders", shown="`megatron_output/{model_suffix}`"
    )
    save_interval: PositiveInt = arg(
        500, "steps from one checkpoint to the next; the end of the run always saves"
    )
    no_save_optim: bool = arg(False, "leave the optimizer's state out of checkpoints")
    no_save_rng: bool = arg(False, "leave the random states out of checkpoints")
    load: str | None = arg(
        None,
        "run folder (or iteration folder) to go on with, or weights that `jupiter export` made",
    )
    no_load_optim: bool = arg(False, "do not take the optimizer's state from it")
    no_load_rng: bool = arg(False, "do not take the random states from it")
    finetune: bool = arg(False, "take only the weights from `load`; the run begins at step 0")
    async_save: bool = arg(
        False, "write checkpoints while the run goes on, from a copy of what they hold"
    )
    ckpt_format: Literal["torch_dist", "torch", "zarr"] = arg(
        "torch_dist",
        "torch_dist: each rank writes its own part; torch: all in one file; any number of ranks "
        "can go on with both",
        only=["torch_dist", "torch"],
        because="Megatron-Core itself has given this format up",
    )
    no_initialization: bool = arg(
        True,
        "false: training from scratch; new weights are drawn with the seed, unless `load` has "
        "some, and the model's arguments decide its shape",
    )
    auto_detect_ckpt_format: bool = arg(
        True, "take the format of `load` as it is; false: only `ckpt_format` will do"
    )
    exit_on_missing_checkpoint: bool = arg(
        True, "an error when `load` holds no checkpoint; false: begin anew"
    )


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """How the work is spread."""

    distributed_backend: Literal["nccl", "gloo"] = arg(
        "nccl", "gloo is taken wherever a rank has no GPU of its own"
    )
    use_distributed_optimizer: bool = arg(
        True, "each data-parallel rank keeps and updates its part of the optimizer (ZeRO-1)"
    )
    tensor_model_parallel_size: PositiveInt = arg(
        1, "ranks that share each layer: attention heads, MLP, vocabulary"
    )
    pipeline_model_parallel_size: PositiveInt = arg(
        1, "stages that the layers are split over; the split may be uneven"
    )
    stage_num_hidden_layers_list: list[PositiveInt] | None = arg(
        None, "decoder layers of each pipeline stage", shown="as even as can be"
    )
    pipeline_schedule: Literal["1f1b", "gpipe", "interleaved"] = arg(
        "1f1b", "in what order a stage does its micro-batches"
    )
    virtual_pipeline_model_parallel_size: PositiveInt | None = arg(
        None, "with interleaved: parts of the layers that each stage has", shown="2"
    )
    sequence_parallel: bool = arg(
        False, "between the products of a layer, tensor parallel ranks share the rows"
    )
    context_parallel_size: PositiveInt = arg(
        1, "ranks that share each sequence; keys and values are gathered in each layer"
    )
    tp_comm_overlap: bool = arg(
        False,
        "overlap of tensor parallel messages",
        instead="a product waits for its message; torch has no kernel that does both in one",
    )
    overlap_grad_reduce: bool = arg(
        False, "add up gradients over the replicas while the backward goes on"
    )
    overlap_param_gather: bool = arg(
        False, "fetch the replicas' weights while the next forward begins"
    )
    distributed_timeout_minutes: Positive = arg(
        60.0, "a rank gives up on a neighbour that is silent for so long"
    )


@dataclass(frozen=True, kw_only=True)
class Logging:
    """What is told of a run."""

    progress: ProgressMode = arg("auto", "on stderr: for people, as JSON lines, or only failures")
    log_params_norm: bool = arg(True, "log the norm of the weights that learn")
    log_throughput: bool = arg(True, "log tokens per second")
    tensorboard_log_interval: PositiveInt = arg(1, "steps from one TensorBoard point to the next")
    tensorboard_queue_size: PositiveInt = arg(50, "points kept in memory before they are written")
    log_timers_to_tensorboard: bool = arg(True, "times of a step to TensorBoard")
    no_log_learning_rate_to_tensorboard: bool = arg(False, "leave the learning rate out of it")
    log_validation_ppl_to_tensorboard: bool = arg(True, "perplexity of evaluations to TensorBoard")
    log_memory_to_tensorboard: bool = arg(True, "memory of the process to TensorBoard")
    logging_level: Literal["debug", "info", "warning", "error"] | None = arg(
        None,
        "what is told on stderr: debug: every step; info: each log step, and what should be known; "
        "warning and error: only failures",
        shown="info",
        also=["logging_leval"],
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """The data, and the folder of the run."""

    dataset: list[str] = arg(
        [], "data files, each `path[#N]`: N rows drawn with the seed", shown="required"
    )
    val_dataset: list[str] = arg([], "data files for evaluation, as `dataset`", shown="none")
    split_dataset_ratio: Share = arg(
        0.01, "share of `dataset` held out for evaluation where there is no `val_dataset`"
    )
    batch_input: list[str] = arg(
        [], "inputs of the `jupiter-tui --batch` outputs in `dataset`", shown="none"
    )
    num_train_epochs: Positive | None = arg(
        None, "length of the run in passes over the data", shown="1, where `train_iters` is none"
    )
    max_length: PositiveInt | None = arg(
        None, "most tokens of a row; the rest is cut off", shown="`seq_length`"
    )
    system: str | None = arg(None, "system message of the rows that have none")
    packing: bool = arg(False, "a sequence of a batch is as many rows as fit `max_length` together")
    add_version: bool = arg(True, "make a folder `v{N}-{YYYYMMDD-HHMMSS}` under `save`")
    streaming: bool = arg(
        False,
        "read `dataset` while training, 1000 rows at a time; of `path#N` the first N rows; needs "
        "`train_iters`, and `val_dataset` for evaluation",
    )
    lazy_tokenize: bool = arg(
        False, "tokenize each row when it is its turn; keeps nothing on the disk"
    )
    dataset_num_proc: PositiveInt | None = arg(
        None,
        "processes that tokenize; what they made is kept on the disk for the next run",
        shown="one, with a thread a core",
    )
    model_author: list[str] = arg(
        [],
        "who made the model, for `{{AUTHOR}}` in the rows: one value, or one for rows with the "
        "tag zh and one for the others",
        shown="none",
    )
    model_name: list[str] = arg(
        [], "what the model is called, for `{{NAME}}` in the rows, as `model_author`", shown="none"
    )
