"""`jupiter run`: one process, the whole model (the original's `main_new.py`)."""

from __future__ import annotations

import argparse

from engine.cli.options import (
    add_config_options,
    add_request_options,
    config_of,
    model_folder,
    on_one_stage,
    params_of,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jupiter run`."""
    add_config_options(parser)
    parser.add_argument("--prompt", help="default: each line of stdin is one")
    add_request_options(parser)


def run(args: argparse.Namespace) -> int:
    """Answer on stdout, figures on stderr."""
    from engine.cli.console import Console, prompts_from_stdin
    from engine.pipeline.build import build_stage, choose_device, make_plan
    from engine.pipeline.run import run_rank

    config = config_of(args)
    folder = model_folder(config)
    # One config file serves every world size.
    plan = make_plan(on_one_stage(config, folder), folder)
    device = choose_device(config.device, 0)
    stage = build_stage(plan, 0, device, lambda done, total: None)
    prompts = prompts_from_stdin() if args.prompt is None else [args.prompt]
    console = Console(prompts, params_of(args), raw=args.raw)
    console.start()
    console.run("run", lambda: run_rank(plan, stage, 0, inbox=console.inbox, emit=console.emit))
