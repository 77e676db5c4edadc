"""`jupiter merge`: write base model and Medusa heads as one Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.checkpoint.sources import fetch
from engine.cli.fetch import report, reporting
from engine.config import load_config
from engine.errors import ConfigError, ExitCode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jupiter merge`."""
    parser.add_argument(
        "--output_dir", required=True, metavar="DIR", help="a new or empty folder for the result"
    )
    parser.add_argument(
        "--config",
        "--config_file",
        metavar="FILE",
        help="names the base model and the heads; looked up as for every command",
    )
    parser.add_argument(
        "--torch_dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights written; without it each stays as it is stored",
    )


def run(args: argparse.Namespace) -> int:
    """Progress goes to stderr; the last line of stdout is the new folder."""
    config = load_config(args.config)
    if config.medusa_head_path is None or config.medusa_num_heads == 0:
        raise ConfigError("no heads to merge: set medusa_head_path in the config")
    with reporting():
        folder = fetch(config.base_model_name_or_path, report)
        heads = fetch(config.medusa_head_path, report)
        import torch  # takes a second; a wrong config is told before

        from engine.checkpoint.merge import merge

        merge(
            folder,
            heads,
            Path(args.output_dir).expanduser(),
            dtype=None if args.torch_dtype is None else getattr(torch, args.torch_dtype),
            max_heads=config.medusa_num_heads,
            progress=_report_tensors,
        )
    print(Path(args.output_dir).expanduser().absolute(), flush=True)
    return ExitCode.OK


def _report_tensors(done: int, total: int) -> None:
    if done * 20 // total != (done - 1) * 20 // total:
        report(f"writing tensor {done} of {total}")
