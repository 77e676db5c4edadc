"""Arguments of what is learnt and how: Megatron-SWIFT's names, defaults and meanings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.training.args_fields import (
    Count,
    NotNegative,
    Positive,
    PositiveInt,
    Share,
    arg,
)

_EAGER = "torch has no such kernel of its own to switch off; it fuses what it can"


@dataclass(frozen=True, kw_only=True)
class Training:
    """Batches, length of the run, kernels."""

    micro_batch_size: PositiveInt = arg(1, "sequences of one forward, on each data-parallel rank")
    global_batch_size: PositiveInt = arg(
        16, "sequences of one step: micro batch × data-parallel size × accumulation steps"
    )
    recompute_granularity: Literal["selective", "full"] = arg(
        "selective",
        "full: whole layers are computed again in the backward; selective: attention's scores, "
        "which torch's kernels never store, so that nothing is left to recompute",
    )
    recompute_method: Literal["uniform", "block"] | None = arg(
        None,
        "with full. uniform: units of `recompute_num_layers` layers keep their input alone; "
        "block: the first `recompute_num_layers` layers of a stage, one by one",
        shown="uniform, with full",
    )
    recompute_num_layers: PositiveInt | None = arg(
        None, "with full: layers of a unit, or of the block", shown="1, with full"
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
    manual_gc: bool = arg(False, "collect garbage at set steps only, the same on all ranks")
    manual_gc_interval: Count = arg(
        0, "with manual_gc: steps between collections; 0: at evaluations and checkpoints only"
    )
    seed: Count = arg(42, "of drawing rows, shuffling and new weights")
    num_workers: Count = arg(
        4,
        "with lazy_tokenize or streaming: micro-batches that a thread makes ready before their "
        "turn; 0: none",
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

    lr: Positive = arg(1e-5, "highest learning rate of the base model")
    lr_decay_style: Literal["cosine", "linear", "constant"] = arg(
        "cosine", "course from the highest to the lowest rate, after the warm-up"
    )
    lr_decay_iters: PositiveInt | None = arg(
        None, "step at which the lowest rate is reached", shown="`train_iters`"
    )
    lr_warmup_iters: Count = arg(0, "steps in which the rate rises linearly from 0")
    min_lr: NotNegative = arg(
        0.0,
        "lowest rate: of `lr`, or with medusa1 of `medusa_lr`; medusa2's heads go down alike",
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
        "compute in float16 with dynamic loss scaling, keep float32 masters",
        shown="from the model's dtype",
    )
    bf16: bool | None = arg(
        None, "compute in bfloat16, keep float32 masters", shown="from the model's dtype"
    )
    apply_query_key_layer_scaling: bool | None = arg(
        None,
        "scaling of scores against float16's limits",
        shown="true with fp16",
        instead="torch's kernels keep scores in float32, so that they cannot overflow",
    )
    attention_softmax_in_fp32: bool = arg(
        True, "precision of attention's softmax", instead="torch's kernels always sum in float32"
    )
