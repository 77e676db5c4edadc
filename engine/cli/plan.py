"""`jupiter plan`: measure each stage's device and each link, and choose split and chunks.

    jupiter plan --stages 3 --aim ttft
    jupiter plan --profile boards.json --aim throughput

The last line is one JSON object. docs/planner.md tells how it is computed, and a profile's schema.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from msgspec.structs import replace

from engine.cli.options import add_config_options, config_of, model_folder
from engine.config import JupiterConfig, find_config
from engine.config_file import save_split
from engine.errors import ConfigError, ExitCode
from engine.model.config import ModelConfig
from engine.planning.measuring import profile_of
from engine.planning.planner import Aim, Prediction, Workload, plan, predict
from engine.planning.profiles import Profile, read_profile, write_profile
from engine.planning.setup import costs_of, workload

GIB = 1 << 30
BAR = 56


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jupiter plan`."""
    add_config_options(parser)
    parser.add_argument("--stages", type=_positive, metavar="N", help="else as the config has")
    parser.add_argument("--aim", choices=get_args(Aim), help="else plan_aim of the config")
    parser.add_argument(
        "--prompt", type=_positive, default=512, metavar="TOKENS", help="of a prompt (512)"
    )
    parser.add_argument(
        "--sequences", type=_positive, metavar="N", help="at once, for throughput (max_num_seqs)"
    )
    parser.add_argument("--profile", metavar="FILE", help="plan for these devices, measure none")
    parser.add_argument("--again", action="store_true", help="measure, profile in the cache or not")
    parser.add_argument("--output", metavar="FILE", help="write the profile there")
    parser.add_argument("--save", action="store_true", help="write the split to config.json")
    parser.add_argument(
        "--check", action="store_true", help="run three splits and put predicted beside measured"
    )


def run(args: argparse.Namespace) -> int:
    """Plan; returns the exit code."""
    config = _config(args)
    if args.check and config.plan_profile is not None:
        raise ConfigError("--check runs on this machine: give it no profile")
    folder = model_folder(config)
    layers = ModelConfig.from_folder(folder).num_hidden_layers
    profile = asyncio.run(profile_of(config, folder, _say, again=args.again))
    if args.output is not None:
        write_profile(Path(args.output), profile)
    load = workload(config, folder, args.prompt, args.sequences or config.max_num_seqs)
    aim: Aim = args.aim or config.plan_aim
    costs = costs_of(config, folder, profile, load.sequences if aim == "throughput" else 1)
    best = plan(costs, aim, load)
    even = _even(layers, costs.stages)
    beside = predict(costs, even, load) if costs.fits(even) else None
    print("\n".join(_report(profile, aim, load, best, beside)))
    if args.save:
        source = find_config(args.config)
        target = source if args.config else Path("config.json")
        save_split(target, best.split, source)
        _say(f"{list(best.split)} is now the split in {target}")
    line = {"plan": aim, **_told(best), "prompt": load.prompt, "even": beside and _told(beside)}
    if args.check:
        from engine.planning.check import check

        line["check"] = check(config, folder, costs, load, best)
    print(json.dumps(line), flush=True)
    return ExitCode.OK


def _config(args: argparse.Namespace) -> JupiterConfig:
    config = config_of(args)
    profile = args.profile or config.plan_profile
    stages = args.stages or config.world_size
    if profile is not None and args.stages is None:
        stages = len(read_profile(profile).devices)
    return replace(
        config, stage_num_hidden_layers_list=[1] * stages, num_stages=stages, plan_profile=profile
    )


def _even(layers: int, stages: int) -> tuple[int, ...]:
    each, more = divmod(layers, stages)
    return tuple(each + (rank < more) for rank in range(stages))


def _report(
    profile: Profile, aim: Aim, load: Workload, best: Prediction, even: Prediction | None
) -> list[str]:
    lines = _devices(profile)
    lines += ["", f"planned for {aim}, a prompt of {load.prompt} tokens:"]
    rows = [("", "planned", "even")]
    figures: tuple[tuple[str, Callable[[Prediction], str]], ...] = (
        ("layers per stage", lambda p: _list(p.split)),
        ("time to first token, ms", lambda p: f"{1000 * p.ttft_s:.0f}"),
        ("ms per token, one sequence", lambda p: f"{1000 * p.token_s:.1f}"),
        ("  tree nodes, tokens per step", lambda p: f"{p.draft.nodes}, {p.draft.tokens:.2f}"),
        (f"tokens/s, {load.sequences} sequences", lambda p: f"{p.tokens_per_s:.1f}"),
        ("bubbles in the prefill", lambda p: f"{p.bubble:.0%}"),
        ("memory per stage, GiB", lambda p: _list(f"{b / GIB:.2f}" for b in p.memory)),
    )
    for label, text in figures:
        rows.append((label, text(best), "does not fit" if even is None else text(even)))
    widths = [max(len(cells[i]) for cells in rows) for i in range(3)]
    for cells in rows:
        aligned = [f"{cells[0]:<{widths[0]}}"]
        aligned += [f"{cell:>{widths[i + 1]}}" for i, cell in enumerate(cells[1:])]
        lines.append("  ".join(aligned).rstrip())
    lines += ["", f"chunks: {_list(best.chunks)}", *timeline(best), ""]
    return lines


def _devices(profile: Profile) -> list[str]:
    lines = []
    for rank, (device, host) in enumerate(zip(profile.devices, profile.hosts, strict=True)):
        layer = ", ".join(f"{n}: {1000 * device.layer_s(n, 0):.2f}" for n in device.rows)
        text = f"stage {rank} on {device.name} ({host}): ms per layer by tokens {layer}"
        if device.judge_ms is not None:
            text += f"; lm_head and heads {device.judge_ms[0]:.1f} ms"
        if device.slowdown > 1:
            text += f"; {device.slowdown:.2f} times slower while all on its host compute"
        if device.memory_bytes is not None:
            text += f"; {device.memory_bytes / GIB:.1f} GiB for stages"
        lines.append(text)
        if profile.links:
            link = profile.links[rank]
            rate = "n/a" if link.mbit_per_s is None else f"{link.mbit_per_s:.0f} Mbit/s"
            lines.append(f"  link behind it: {link.latency_ms:.2f} ms, {rate}")
    return lines


def timeline(found: Prediction) -> list[str]:
    """The prefill of each stage as a bar: a letter for each chunk, a dot where it waits."""
    lines = []
    for rank in range(len(found.split)):
        bar = ["·"] * BAR
        for span in found.prefill.spans:
            if span.rank == rank:
                first = round(span.began / found.ttft_s * BAR)
                last = max(first + 1, round(span.ended / found.ttft_s * BAR))
                letter = chr(ord("a") + span.batch % 26)
                bar[first:last] = [letter] * (min(last, BAR) - first)
        lines.append(f"stage {rank} {''.join(bar)}")
    return lines


def _told(found: Prediction) -> dict[str, object]:
    return {
        "split": list(found.split),
        "chunks": list(found.chunks),
        "ttft_ms": round(1000 * found.ttft_s, 2),
        "ms_per_token": round(1000 * found.token_s, 3),
        "tokens_per_step": round(found.draft.tokens, 3),
        "tokens_per_s": round(found.tokens_per_s, 2),
        "bubble": round(found.bubble, 4),
        "memory_bytes": list(found.memory),
    }


def _list(items: object) -> str:
    return ", ".join(map(str, items))  # type: ignore[call-overload]


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not '{text}'")
    return number


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
