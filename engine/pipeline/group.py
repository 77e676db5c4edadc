"""Joining the process group: over a file, over the queue, or an init_method given by hand."""

from __future__ import annotations

import gc
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from engine.config import JupiterConfig
from engine.errors import ConfigError, EngineError
from engine.pipeline.exchange import QueueStore

# How long a stage waits for the others to load; a dead one is noticed by its parent, not here.
PATIENCE = timedelta(days=1)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def group_timeout(config: JupiterConfig) -> timedelta:
    """After this long without a message a receive fails."""
    return timedelta(minutes=config.distributed_timeout_minutes)


def tick_seconds(config: JupiterConfig) -> float:
    """How often an idle rank 0 sends a tick round, so that no receive reaches the timeout."""
    return min(5.0, group_timeout(config).total_seconds() / 4)


def choose_backend(config: JupiterConfig, device: torch.device) -> str:
    """NCCL only where every rank has a GPU of its own, else gloo with copies through the host."""
    if config.distributed_backend == "gloo":
        return "gloo"
    if device.type != "cuda":
        raise ConfigError("key 'distributed_backend': 'nccl' needs GPUs; use \"gloo\"")
    return "nccl" if torch.cuda.device_count() >= config.world_size else "gloo"


def neighbours(config: JupiterConfig, device: torch.device) -> int:
    """Stages that compute on the same cores as this one, itself included."""
    return 1 if device.type != "cpu" or config.num_threads is not None else stages_here(config)


def stages_here(config: JupiterConfig) -> int:
    """Stages that run on this machine, as far as that is known."""
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun's
        return int(os.environ["LOCAL_WORLD_SIZE"])
    host = urlsplit(config.init_method).hostname or "127.0.0.1"
    return config.world_size if host in LOOPBACK else 1


def store_of(path: Path, exchange: str, config: JupiterConfig) -> Any:
    """The store of a process group: in a file, or on several machines at `exchange`.

    Either opens no port.
    """
    if not exchange:
        return dist.FileStore(  # type: ignore[attr-defined]
            str(path), config.world_size
        )
    return QueueStore(exchange, f"{path.name}/", group_timeout(config))


def join_over(store: Any, rank: int, world: int, backend: str, config: JupiterConfig) -> None:
    """Join over a store, once all ranks have loaded."""
    store.set(f"ready/{rank}", "1")
    store.wait([f"ready/{r}" for r in range(world)], PATIENCE)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=group_timeout(config)
    )


def leave() -> None:
    """Give up the process group: the neighbours that wait for this rank find out at once."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # connections close with the last that holds them


def check_address(config: JupiterConfig, rank: int) -> None:
    """Look at init_method before anything is loaded, and keep gloo on loopback if it is there.

    Raises ConfigError when rank 0 finds the port in use.
    """
    parts = urlsplit(config.init_method)
    if parts.scheme != "tcp":
        return
    host = parts.hostname or "127.0.0.1"
    if host in LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if rank > 0:
        return
    try:
        with socket.create_server((host, parts.port or 0)):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(
            f"key 'init_method': {config.init_method}: cannot listen there: {reason}; "
            "choose another port"
        ) from None


def join_by_address(rank: int, world: int, backend: str, config: JupiterConfig) -> None:
    """Join over the config's init_method, as stages started by hand do.

    Raises EngineError when the others did not come within the group's timeout.
    """
    method = config.init_method
    try:
        dist.init_process_group(
            backend,
            init_method=method,
            rank=rank,
            world_size=world,
            timeout=group_timeout(config),
        )
    except (RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise EngineError(f"rank {rank}: could not join over {method}: {line}") from None
