"""The other machines as the client sees them: there with the model, or not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path

from engine.config import JupiterConfig
from engine.errors import ConfigError
from engine.nodes.hub import Hub
from engine.nodes.seats import Seat
from engine.nodes.weights import Artifact, describe


async def gather(
    hub: Hub,
    config: JupiterConfig,
    folder: Path,
    say: Callable[[str], None],
    seats: Collection[int] = (),
) -> list[Seat]:
    """Wait until the machines that `config` needs are here with model and heads.

    A run of fewer stages than machines needs no more machines than stages.

    Args:
        folder: of the model, here.
        say: as for `Hub.gather`.
        seats: numbers of those that it has to be, if any have.

    Raises CheckpointError when the files here cannot be sent, and as `Hub.gather`.
    """
    model, heads = await asyncio.to_thread(_artifacts, config, folder)
    others = min(config.world_size, hub.machines) - 1
    return await hub.gather(model, heads, others, say, seats)


Described = tuple[Artifact, list[Path]]


def _artifacts(config: JupiterConfig, folder: Path) -> tuple[Described, Described | None]:
    from engine.checkpoint.sources import local_folder

    model = describe(config.base_model_name_or_path, folder)
    source = config.medusa_head_path if config.medusa_num_heads != 0 else None
    return model, describe(source, local_folder(source)) if source is not None else None


async def lost_machine(hub: Hub, seats: Collection[Seat]) -> str:
    """Why one of these machines is not there any more; "" where all are."""
    await hub.steady()
    return next((f"{seat.title()} {seat.why}" for seat in seats if not seat.taken), "")


def check_spread(config: JupiterConfig, machines: int) -> None:
    """Raises ConfigError where `config` cannot run on so many machines."""
    if config.auto_split:
        raise ConfigError(
            "--nnodes: an automatic split measures one machine only; name the layers of each "
            "stage, such as --stages 15,15"
        )
    if config.world_size < machines:
        raise ConfigError(
            f"--nnodes {machines}: stage_num_hidden_layers_list has {config.world_size} "
            f"stage{'s' if config.world_size > 1 else ''}; {machines} machines need one each"
        )
    if config.distributed_backend != "gloo":
        raise ConfigError(
            "--nnodes: key 'distributed_backend': stages on several machines use gloo"
        )
