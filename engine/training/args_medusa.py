"""Arguments of Medusa heads and of self-distillation: Jupiter's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.training.args_fields import (
    NONE_WORDS,
    Count,
    NotNegative,
    PartOfOne,
    Positive,
    PositiveInt,
    Share,
    arg,
)
from engine.training.args_run import ProgressMode

Layout = Literal["fasterdecoding", "vllm", "v2", "jupiter"]


@dataclass(frozen=True, kw_only=True)
class Medusa:
    """What the heads are and how they learn."""

    medusa_objective: Literal["medusa1", "medusa2"] = arg(
        "medusa1", "medusa1: the base stays as it is; medusa2: base and heads learn together"
    )
    medusa_num_heads: PositiveInt = arg(5, "heads; head h predicts the token h + 2 ahead")
    medusa_num_layers: PositiveInt = arg(1, "blocks of each head")
    medusa_head_kind: Literal["resblock", "root", "hydra"] = arg(
        "resblock",
        "resblock: as in Medusa; root: the first block also sees the token drafting starts from; "
        "hydra: and the tokens drafted before the head's own",
    )
    medusa_inner_size: PositiveInt | None = arg(
        None,
        "width inside the first block of root and hydra heads",
        shown="twice the model's `hidden_size`",
    )
    medusa_head_path: str | None = arg(
        None,
        "trained heads to begin with: a folder, `bundled:NAME` or a hub id; hydra heads may begin "
        "with root heads, and narrower ones with wider ones",
        none_words=NONE_WORDS,
    )
    original_lm_head: bool = arg(
        True, "the heads share the base's `lm_head`; false: an output layer for each"
    )
    medusa_lr: Positive = arg(1e-3, "highest learning rate of the heads")
    medusa_warmup_iters: Count = arg(
        0, "steps in which the heads learn alone before medusa2 joins the base"
    )
    medusa_head_weights: list[NotNegative] | None = arg(
        None, "weight of each head's loss", shown="0.8 to the power of h"
    )
    medusa_soft_targets: Share = arg(
        0.0,
        "share of what heads learn that is the base's own distribution over their tokens; "
        "the rest is the answers' tokens",
    )
    cache_hidden_states: str | None = arg(
        None,
        "keep the frozen base's hidden states on disk: true, or a folder for them",
        shown="false",
        none_words=("false", "none", "null"),
    )
    load_in_8bit: bool = arg(
        False,
        "cached hidden states are those of the base in int8, as the engine runs it; "
        "on a CPU that is also faster",
    )
    truncated_vocab_size: PositiveInt | None = arg(
        None, "heads' loss over only so many tokens, the answers' most frequent", shown="all"
    )
    heads_layout: Layout | None = arg(
        None,
        "layout of the written heads",
        shown="jupiter for root and hydra heads, v2 with `original_lm_head`, else fasterdecoding",
    )


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How the model answers prompts."""

    max_new_tokens: PositiveInt = arg(512, "most tokens of an answer")
    temperature: NotNegative = arg(0.0, "0 is greedy")
    top_p: PartOfOne | None = arg(None, "of nucleus sampling", shown="the config's")
    max_num_seqs: PositiveInt | None = arg(
        None, "sequences decoded at a time", shown="the config's"
    )
    limit: PositiveInt | None = arg(None, "only the first so many prompts", shown="all")


@dataclass(frozen=True, kw_only=True)
class SelfDistillation(Answers):
    """`jupiter medusa --generate PROMPTS`: answers first, then training on them."""

    generate: str | None = arg(
        None,
        "prompts, as `path[#N]`, that the model is to answer before it learns",
        none_words=NONE_WORDS,
    )
    generate_output: str | None = arg(
        None, "file of the answers", shown="`{generate}.answers.jsonl`"
    )


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(Answers):
    """`jupiter medusa generate`."""

    progress: ProgressMode = arg("auto", "on stderr: for people, as JSON lines, or only failures")
    dataset: list[str] = arg([], "prompt files, each `path[#N]`", shown="required")
    output: str | None = arg(None, "JSONL file of the answers", shown="required")
    model: str | None = arg(None, "the model that answers, on one stage", shown="the config's")
    config: str | None = arg(
        None,
        "Jupiter's config file",
        shown="`config.json` here, else the built-in one",
        also=["config_file"],
    )
    system: str | None = arg(None, "system message of the prompts that have none")
    batch_input: list[str] = arg([], "as for training", shown="none")
    seed: Count = arg(42, "of drawing rows and of sampling")


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """`jupiter medusa eval`."""

    dataset: list[str] = arg([], "files of rows or prompts, each `path[#N]`", shown="required")
    config: str | None = arg(
        None,
        "Jupiter's config file",
        shown="`config.json` here, else the built-in one",
        also=["config_file"],
    )
    model: str | None = arg(None, "the base model", shown="the config's")
    medusa_head_path: str | None = arg(None, "the heads", shown="the config's")
    medusa_choices: str | None = arg(
        None, "the draft tree: auto, mc_16, mc_63 or JSON paths", shown="the config's"
    )
    limit: PositiveInt | None = arg(None, "only the first so many rows", shown="all")
    max_new_tokens: PositiveInt = arg(128, "most tokens of an answer")
    json: str | None = arg(None, "file for the figures as JSON", shown="none")
    calibrate: bool = arg(False, "store how often they are right beside the heads, for trees")
    system: str | None = arg(None, "system message of the rows that have none")
    seed: Count = arg(42, "of drawing rows and of sampling")
