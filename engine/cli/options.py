"""Options that several subcommands share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from engine.config import JupiterConfig, load_config
from engine.protocol import SamplingParams


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """`--config` (also `--config_file`, the original's name) and `--set`."""
    parser.add_argument("--config", "--config_file", dest="config", metavar="FILE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--no-heads", action="store_true", help="run without Medusa heads")


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """How the answers are written."""
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without a chat template"
    )
    parser.add_argument("--max_new_tokens", type=int, metavar="N")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--seed", type=int)


def config_of(args: argparse.Namespace, stages: str | None = None) -> JupiterConfig:
    """The config that the command line asks for."""
    return load_config(args.config, stages=stages, assignments=args.set, no_heads=args.no_heads)


def on_one_stage(config: JupiterConfig, folder: Path) -> JupiterConfig:
    """The config with all layers on one stage, whatever its split says."""
    from engine.model.config import ModelConfig

    layers = sum(config.stage_num_hidden_layers_list)
    if config.auto_split:
        layers = ModelConfig.from_folder(folder).num_hidden_layers
    return msgspec.structs.replace(config, stage_num_hidden_layers_list=[layers])


def params_of(args: argparse.Namespace) -> SamplingParams:
    """The request parameters that the command line asks for."""
    return SamplingParams(
        max_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )


def model_folder(config: JupiterConfig) -> Path:
    """The folder of the config's model, fetched into the cache if it is not there yet."""
    from engine.checkpoint.sources import fetch

    return fetch(config.base_model_name_or_path, lambda line: print(line, file=sys.stderr))
