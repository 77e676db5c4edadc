"""`jupiter stage`: one rank, started by hand on its device (the original's `pipe_main.py`).

    jupiter stage --world 2 --rank 1 --config_file config.json &
    jupiter stage --world 2 --rank 0 --config_file config.json

Rank 0 reads prompts, one a line, and prints the answers; the end of its input stops all ranks.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

import msgspec

from engine.cli.options import (
    add_config_options,
    add_request_options,
    config_of,
    model_folder,
    params_of,
)
from engine.errors import ConfigError
from engine.planning.auto import planned_by_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jupiter stage`."""
    parser.add_argument("--world", type=int, required=True, help="number of stages")
    parser.add_argument("--rank", type=int, required=True, help="this stage, from 0")
    add_config_options(parser)
    add_request_options(parser)


def run(args: argparse.Namespace) -> int:
    """Serve as one rank until rank 0 has no more prompts."""
    config = config_of(args)
    world, rank = args.world, args.rank
    if config.auto_split:
        config = msgspec.structs.replace(
            config, stage_num_hidden_layers_list=[1] * world, num_stages=world
        )
        config = planned_by_file(config, model_folder(config))
    if world != config.world_size:
        raise ConfigError(
            f"--world {world}: stage_num_hidden_layers_list has {config.world_size} entries "
            f"({config.stage_num_hidden_layers_list}); the two must agree"
        )
    if not 0 <= rank < world:
        raise ConfigError(f"--rank {rank}: must be from 0 to {world - 1}")
    # A receive that waits for a neighbour does not run Python's handler for Ctrl+C.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Read when torch is loaded, below: a stage that waits must not spin on the others' cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from engine.cli.console import Console, prompts_from_stdin
    from engine.pipeline.build import build_stage, choose_device, make_plan
    from engine.pipeline.group import check_address, choose_backend, join_by_address
    from engine.pipeline.run import run_rank

    if world > 1:
        check_address(config, rank)
    plan = make_plan(config, model_folder(config))
    device = choose_device(config.device, int(os.environ.get("LOCAL_RANK", rank)))
    stage = build_stage(plan, rank, device, lambda done, total: None)
    layers = plan.layers(rank)
    print(f"rank {rank}: layers {layers.start}-{layers.stop - 1} on {device}", file=sys.stderr)
    if world > 1:
        join_by_address(rank, world, choose_backend(config, device), config)
    console = Console(prompts_from_stdin(), params_of(args), raw=args.raw)
    if rank == 0:
        console.start()
    console.run(
        "stage", lambda: run_rank(plan, stage, rank, inbox=console.inbox, emit=console.emit)
    )
