"""Arguments of what is learnt and how: Megatron-SWIFT's names, defaults and meanings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.training.args_fields import (
    LATER,
    Count,
    NotNegative,
    Positive,
    PositiveInt,
    Share,
    arg,
)

_EAGER = "torch has no such kernel of its own to switch off; it fuses what it can"
_WITH_FULL = f"goes with recompute_granularity full, which {LATER}"


@dataclass(frozen=True, kw_only=True)
class Training:
    """Batches, length of the run, kernels."""

    micro_batch_size: PositiveInt = arg(1, "sequences of one forward, on each data-parallel rank")
    global_batch_size: PositiveInt = arg(
        16, "sequences of one step: micro batch × data-parallel size × accumulation steps"
    )
    recompute_granularity: Literal["selective", "full"] = arg(
        "selective",
        "selective: attention scores are never stored, so there is nothing to recompute",
        only=["selective"],
        because=f"recomputing whole layers {LATER}",
    )
    recompute_method: Literal["uniform", "block"] | None = arg(
        None, "how full recomputing picks its layers", only=[None], because=_WITH_FULL
    )
    recompute_num_layers: PositiveInt | None = arg(
        None, "layers per recomputed unit", only=[None], because=_WITH_FULL
    )
    deterministic_mode: bool = arg(False, "only deterministic kernels; fails where there is none")
    train_iters: PositiveInt | None = arg(None, "steps of the run", shown="from `num_train_epochs`")
    log_interval: PositiveInt = arg(5, "steps from one line of logging.jsonl to the next")
    tensorboard_dir: str | None = arg(
        None, "folder of TensorBoard's files", shown="`runs` in the run folder"
    )
    no_masked_softmax_fusion: bool = arg(False, "a fusion switch", instead=_EAGER)
    no_bias_dropout_fusion: bool = arg(False, "a fusion switch", instead=_EAGER)
    no_bias_swiglu_fusion: bool = arg(False, "a fusion switch", instead=_EAGER)
    no_rope_fusion: bool = arg(False, "a fusion switch", instead=_EAGER)
    no_gradient_accumulation_fusion: bool = arg(False, "a fusion switch", instead=_EAGER)
    cross_entropy_loss_fusion: bool = arg(
        False, "a fusion switch", instead="the loss is torch's cross entropy, one kernel already"
    )
    use_flash_attn: bool = arg(
        False,
        "a kernel switch",
        instead="torch's scaled_dot_product_attention takes a flash kernel wherever there is one",
    )
    optimizer: Literal["adam", "sgd"] = arg("adam", "adam is AdamW: weight decay is decoupled")
    dataloader_type: Literal["cyclic", "single", "external"] = arg(
        "cyclic",
        "cyclic: each epoch in an order of its own, drawn with the seed; single: in file order",
        only=["cyclic", "single"],
        because="a loader of one's own cannot be given to a command",
    )
    manual_gc: bool = arg(
        False, "collect garbage at set steps only", only=[False], because=f"this {LATER}"
    )
    manual_gc_interval: Count = arg(
        0, "steps between collections", only=[0], because=f"it goes with manual_gc, which {LATER}"
    )
    seed: Count = arg(42, "of drawing rows, shuffling and new weights")
    num_workers: Count = arg(
        4, "loader processes", instead="rows are tokenized before the first step, so none wait"
    )
    seq_length: PositiveInt | None = arg(
        None, "most tokens of a sequence", shown="the model's `max_position_embeddings`"
    )
    use_cpu_initialization: bool = arg(
        False, "where new weights are made", instead="new heads are always made on the CPU"
    )
    no_create_attention_mask_in_dataloader: bool = arg(
        True,
        "whether the loader makes masks",
        instead="no mask is made: every sequence attends within itself",
    )


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """The learning rate's course."""

    lr: Positive = arg(1e-5, "highest learning rate of the base model (Medusa-2)")
    lr_decay_style: Literal["cosine", "linear", "constant"] = arg(
        "cosine", "course from the highest to the lowest rate, after the warm-up"
    )
    lr_decay_iters: PositiveInt | None = arg(
        None, "step at which the lowest rate is reached", shown="`train_iters`"
    )
    lr_warmup_iters: Count = arg(0, "steps in which the rate rises linearly from 0")
    min_lr: NotNegative = arg(
        0.0,
        "lowest rate, of the heads with medusa1, of `lr` with medusa2 (the heads' goes down alike)",
    )


@dataclass(frozen=True, kw_only=True)
class Regularization:
    """Weight decay, clipping, the optimizer's constants."""

    weight_decay: NotNegative = arg(0.1, "of all weights but norms and biases")
    clip_grad: NotNegative = arg(1.0, "largest norm of all gradients together; 0: no clipping")
    adam_beta1: Share = arg(0.9, "decay of Adam's first moment")
    adam_beta2: Share = arg(0.95, "decay of Adam's second moment")
    adam_eps: Positive = arg(1e-8, "added to the root of Adam's second moment")
    sgd_momentum: Share = arg(0.9, "momentum of SGD")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """When the held-out rows are looked at."""

    eval_iters: Count = arg(
        100, "steps of `global_batch_size` rows of one evaluation, at most all; 0: none"
    )
    eval_interval: PositiveInt | None = arg(
        None, "steps from one evaluation to the next", shown="`save_interval`"
    )


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """The numbers that are computed with."""

    fp16: bool | None = arg(
        None,
        "float16 with loss scaling",
        shown="false",
        only=[None, False],
        because=f"loss scaling {LATER}; use bf16",
    )
    bf16: bool | None = arg(
        None, "compute in bfloat16, keep float32 masters", shown="from the model's dtype"
    )
    apply_query_key_layer_scaling: bool | None = arg(
        None,
        "scaling of scores for float16",
        shown="none",
        only=[None, False],
        because=f"it goes with fp16, which {LATER}",
    )
    attention_softmax_in_fp32: bool = arg(
        True, "precision of attention's softmax", instead="torch's kernels always sum in float32"
    )
