"""`jupiter bench faults`: breaks a live engine at random moments and counts what comes of it.

    jupiter bench faults --trials 100 --kind kill --stages 10,10,10

Greedy answers are compared with the undisturbed ones token by token. The seed decides whom it
meets, when, and how; when a process is met within a step is up to the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Sequence
from typing import get_args

from engine.bench.faults.answers import AnswerKind, AnswerTrials
from engine.bench.faults.batches import BatchTrials
from engine.bench.faults.counts import Counts
from engine.cli.options import add_config_options, config_of
from engine.config import JupiterConfig
from engine.errors import ExitCode

KINDS: tuple[AnswerKind, ...] = get_args(AnswerKind)


def main(words: Sequence[str]) -> int:
    """Run the trials; the last line is the JSON. Returns SOME_FAILED where any count is bad."""
    args = _parser().parse_args(words)
    config = config_of(args, stages=args.stages)
    counts = asyncio.run(_answers(args, config)) if args.kind != "batch" else {}
    if args.kind in ("batch", "all"):
        rng = random.Random(f"{args.seed} batch")
        counts["batch"] = BatchTrials(config, rng, _say).run(args.trials)
    total = Counts()
    for kind, one in counts.items():
        print(one.text(kind))
        total.merge(one)
    line = {
        "bench": "faults",
        "kind": args.kind,
        "seed": args.seed,
        "stages": config.stage_num_hidden_layers_list,
        **total.line(),
    }
    print(json.dumps(line), flush=True)
    good = total.survived == total.trials and not total.wrong and not total.orphans
    return ExitCode.OK if good else ExitCode.SOME_FAILED


async def _answers(args: argparse.Namespace, config: JupiterConfig) -> dict[str, Counts]:
    rng = random.Random(f"{args.seed} answers")
    kinds = list(KINDS if args.kind == "all" else (args.kind,)) * args.trials
    rng.shuffle(kinds)
    return await AnswerTrials(config, rng, args.max_new_tokens, _say).run(kinds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jupiter bench faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_config_options(parser)
    parser.add_argument("--trials", type=int, default=10, metavar="N", help="of each kind")
    parser.add_argument("--kind", choices=(*KINDS, "batch", "all"), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", metavar="SPLIT", help="layers per stage, such as 10,10,10")
    parser.add_argument("--max_new_tokens", type=int, default=64, metavar="N")
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
