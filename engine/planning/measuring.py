"""Profiles of this machine's stages: measured on a live engine, and kept in the cache folder."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from engine.config import JupiterConfig
from engine.errors import ConfigError, EngineError
from engine.model.config import ModelConfig
from engine.paths import cache_dir
from engine.planning.answers import Took, prompts_of, take_answers
from engine.planning.overhead import with_overhead
from engine.planning.profiles import Profile, read_profile, write_profile
from engine.protocol import EventEnvelope, Profiled

if TYPE_CHECKING:
    from engine.client import EngineClient, Update

Say = Callable[[str], None]
PROMPT = 512
"""Tokens of the prompts that are asked of the stages that are measured, or half the context."""
PROMPTS = 6
"""The first is to warm up; the median of the others counts."""


def about(config: JupiterConfig) -> dict[str, str]:
    """What a profile depends on; it is kept under these."""
    bits = config.weight_bits
    threads = config.num_threads or os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1
    return {
        "model": config.base_model_name_or_path,
        "heads": str(config.medusa_head_path or "") if config.medusa_num_heads != 0 else "none",
        "num_heads": str(config.medusa_num_heads or ""),
        "weights": f"int{bits}" if bits else config.torch_dtype,
        "dtype": config.torch_dtype,
        "device": config.device,
        "threads": str(threads),
        "stages": str(config.world_size),
        "context": str(config.max_kv_cache_length),
        "machine": f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores",
        "jupiter": version("jupiter-workbench"),
    }


def cache_path(config: JupiterConfig) -> Path:
    """Where the profile of a config's stages is kept, be it there or not."""
    text = json.dumps(about(config), sort_keys=True)
    return cache_dir() / "profiles" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def cached(config: JupiterConfig) -> Profile | None:
    """The profile that was measured before; None without one, or with one that cannot be read."""
    with suppress(ConfigError):
        return read_profile(cache_path(config))
    return None


def named_profile(config: JupiterConfig, name: str) -> Profile:
    """The profile in a file, which has to be of as many stages; raises ConfigError."""
    profile = read_profile(name)
    if len(profile.devices) != config.world_size:
        raise ConfigError(
            f"{name}: has {len(profile.devices)} devices, but there are {config.world_size} stages"
        )
    return profile


async def profile_of(
    config: JupiterConfig, folder: Path, say: Say, *, again: bool = False
) -> Profile:
    """The profile of the config's stages: the one named, the one kept, or one measured now.

    Args:
        config: its split may be any; `plan_profile` names a file that goes before measuring.
        folder: of the model.
        say: gets a line for people before something takes long.
        again: measure even where there is one.

    Raises:
        ConfigError: a named file that cannot be used, or is of another number of stages.
        EngineError: the engine did not start, or died.
    """
    if config.plan_profile is not None:
        return named_profile(config, config.plan_profile)
    if not again and (found := cached(config)) is not None:
        return found
    world, layers = config.world_size, ModelConfig.from_folder(folder).num_hidden_layers
    if world > layers:
        raise ConfigError(f"{world} stages are more than the {layers} layers of the model")
    say(f"measuring {world} stage{'s' if world > 1 else ''}")
    each, more = divmod(layers, world)
    even = [each + (rank < more) for rank in range(world)]
    one = replace(config, stage_num_hidden_layers_list=even, num_stages=None)
    tokens = min(PROMPT, config.max_kv_cache_length // 2)
    profile, took = await measured(one, prompts_of(folder, tokens, PROMPTS))
    profile = replace(with_overhead(one, folder, profile, took), about=about(config))
    write_profile(cache_path(config), profile)
    return profile


async def measured(config: JupiterConfig, prompts: Sequence[str]) -> tuple[Profile, Took]:
    """Start an engine of `config`, measure it, have it answer, and stop it. Raises EngineError."""
    from engine.client import EngineClient

    watcher = Watcher()
    client = EngineClient(config, listener=watcher)
    try:
        await client.start()
        profile = await watcher.measure(client)
        return profile, await take_answers(client, prompts)
    finally:
        await client.stop()


class Watcher:
    """A client's listener that waits for what a measurement has found."""

    def __init__(self) -> None:
        self._found: asyncio.Future[Profile] | None = None

    def __call__(self, update: Update) -> None:
        from engine.updates import ClientState, StateChanged

        if self._found is None or self._found.done():
            return
        lost = (ClientState.DEAD, ClientState.RECOVERING)
        if isinstance(update, StateChanged) and update.state in lost:
            self._found.set_exception(EngineError(update.reason or "the engine was stopped"))
        elif isinstance(update, EventEnvelope) and isinstance(update.body, Profiled):
            self._found.set_result(update.body.profile)

    async def measure(self, client: EngineClient) -> Profile:
        """Have a client's engine measured, once nothing runs there."""
        self._found = asyncio.get_running_loop().create_future()
        client.measure()
        return await self._found
