"""From a config and the model's files to what the planner needs. Torch-free; reads no weights."""

from __future__ import annotations

import statistics
from dataclasses import replace as with_fields
from pathlib import Path

from msgspec.structs import replace

from engine.checkpoint.head_choices import best_choices, read_acceptance
from engine.checkpoint.preflight import find_heads
from engine.config import JupiterConfig
from engine.decoding.tree import Tree, choose_tree
from engine.decoding.tuner import TreeTuner
from engine.model.config import ModelConfig
from engine.planning.answers import ANSWER_TOKENS, Took
from engine.planning.costs import Costs
from engine.planning.memory import DTYPE_BYTES, read_sizes
from engine.planning.planner import PLAIN, Draft, Workload
from engine.planning.profiles import Profile

CHUNK_LIMIT = 256
"""Rows of the longest chunk that is planned; profiles are measured so far."""


def costs_of(config: JupiterConfig, folder: Path, profile: Profile, sequences: int = 1) -> Costs:
    """The costs of a config's model on the profile's devices.

    sequences: at once; there has to be memory for so many.
    """
    sizes = read_sizes(folder, replace(config, max_sub_sequence_len=longest_chunk(config)))
    model = ModelConfig.from_folder(folder)
    return Costs(
        profile,
        model.num_hidden_layers,
        _row_bytes(config, model.hidden_size),
        sizes,
        sequences,
    )


def _row_bytes(config: JupiterConfig, hidden_size: int) -> int:
    """Of a row of hidden states on a link; as engine/pipeline/wire.py has it."""
    match config.link_dtype:
        case "bfloat16":
            return 2 * hidden_size
        case "int8":
            return hidden_size + 4
    return hidden_size * DTYPE_BYTES[config.torch_dtype]


def longest_chunk(config: JupiterConfig) -> int:
    """Rows of the longest chunk: the planner may go beyond what the config says."""
    return max(CHUNK_LIMIT, config.max_sub_sequence_len)


def workload(config: JupiterConfig, folder: Path, prompt: int, sequences: int) -> Workload:
    """A prompt of so many tokens, so many sequences, and the draft trees of the heads."""
    found = find_heads(config, folder)
    heads = found[1].num_heads if found else 0
    return Workload(
        prompt=prompt,
        context=prompt + 64,
        sequences=sequences,
        drafts=_drafts(config, found[0], heads) if found and heads else PLAIN,
        num_heads=heads,
        longest_chunk=longest_chunk(config),
    )


def met(load: Workload, took: Took) -> Workload:
    """The workload of answers that were taken: their prompt's length, their tree and its tokens."""
    nearest = min(load.drafts, key=lambda draft: abs(draft.nodes - took.nodes))
    draft = Draft(nearest.nodes, nearest.depth, statistics.fmean(took.tokens_per_step))
    context = took.rows + ANSWER_TOKENS // 2
    return with_fields(load, prompt=took.rows, context=context, drafts=[draft])


def _drafts(config: JupiterConfig, heads_path: Path, num_heads: int) -> list[Draft]:
    """The trees that the engine would choose from, with what the calibration promises of each."""
    acceptance = read_acceptance(heads_path)
    tuner = TreeTuner(num_heads, acceptance)
    if config.medusa_choices == "auto":
        return [_draft(tree, tokens) for tree, tokens in tuner.trees()]
    tree = choose_tree(
        config.medusa_choices, num_heads, best_choices(acceptance) if acceptance else None
    )
    return [_draft(tree, tuner.expected_tokens(tree))]


def _draft(tree: Tree, tokens: float) -> Draft:
    return Draft(tree.size, tree.depth, tokens)
