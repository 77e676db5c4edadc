"""`stage_num_hidden_layers_list: "auto"`: the planned split and chunks in the config's place."""

from __future__ import annotations

import asyncio
from pathlib import Path

from msgspec.structs import replace

from engine.config import JupiterConfig
from engine.errors import ConfigError
from engine.planning.costs import Costs
from engine.planning.measuring import Say, named_profile, profile_of
from engine.planning.partition import best_chunks
from engine.planning.planner import plan, unit
from engine.planning.profiles import Profile
from engine.planning.setup import costs_of, longest_chunk, workload

PROMPT = 512
"""Tokens of the prompt that the split is planned for."""
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
"""Prompts whose chunks are planned."""


async def planned(config: JupiterConfig, folder: Path, say: Say) -> JupiterConfig:
    """The config with its stages planned, by the profile that it names, or a kept or a new one.

    Raises ConfigError and EngineError as `profile_of`; ConfigError where no split fits into memory.
    """
    profile = await profile_of(config, folder, say)
    return await asyncio.to_thread(planned_by, config, folder, profile)


def planned_by_file(config: JupiterConfig, folder: Path) -> JupiterConfig:
    """The same for stages started by hand: all of them plan alike from the file that they name.

    Raises ConfigError without a file.
    """
    if config.plan_profile is None:
        raise ConfigError(
            "a split of \"auto\" needs key 'plan_profile' here: stages started by hand have to "
            "agree on it; `jupiter plan --output FILE` writes one"
        )
    return planned_by(config, folder, named_profile(config, config.plan_profile))


def planned_by(config: JupiterConfig, folder: Path, profile: Profile) -> JupiterConfig:
    """The config with the best split for its `plan_aim`, and chunks for prompts of all lengths."""
    load = workload(config, folder, PROMPT, config.max_num_seqs)
    sequences = load.sequences if config.plan_aim == "throughput" else 1
    costs = costs_of(config, folder, profile, sequences)
    split = plan(costs, config.plan_aim, load).split
    chunks = chunk_table(costs, split, config)
    return replace(
        config,
        stage_num_hidden_layers_list=list(split),
        num_stages=None,
        prefill_plan=chunks,
        max_sub_sequence_len=max(
            config.max_sub_sequence_len, *(max(sizes) for sizes in chunks.values())
        ),
    )


def chunk_table(
    costs: Costs, split: tuple[int, ...], config: JupiterConfig
) -> dict[str, list[int]]:
    """The best chunks of prompts of each length that the context holds."""
    table = {}
    for rows in LENGTHS:
        if rows <= max(config.max_kv_cache_length, LENGTHS[0]):
            found = best_chunks(costs, split, rows, unit=unit(rows), longest=longest_chunk(config))
            assert found is not None
            table[str(rows)] = list(found[1])
    return table
