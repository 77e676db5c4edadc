"""`jupiter bench step`: what a decode step costs by the size of its tree, beside the floor.

The whole model as one stage, without processes and queue. The floor is the larger of two times:
that of reading all weights once at the measured memory bandwidth, and that of all operations at
the measured peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from engine.cli.options import add_config_options, config_of, model_folder, on_one_stage
from engine.errors import ConfigError, ExitCode
from engine.launch import worker_environment

if TYPE_CHECKING:
    from engine.bench.floor import Speed, Work
    from engine.pipeline.stage import Stage

NODES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass
class Cost:
    """Median milliseconds of one size of step."""

    nodes: int
    layers_ms: float
    judge_ms: float
    """`lm_head`, acceptance and heads."""

    @property
    def step_ms(self) -> float:
        """Both together."""
        return self.layers_ms + self.judge_ms


def main(words: Sequence[str]) -> int:
    """Run the bench; its last line is the JSON."""
    args = _parser().parse_args(words)
    config = config_of(args)
    folder = model_folder(config)
    config = on_one_stage(msgspec.structs.replace(config, num_threads=args.threads), folder)
    # As a worker has it, and read when torch is loaded: below.
    os.environ.update(worker_environment(config))
    from engine.bench.floor import measure_speed, step_work
    from engine.bench.machine import machine
    from engine.pipeline.build import build_stage, choose_device, make_plan

    plan = make_plan(config, folder)
    largest = max(NODES)
    if args.context + largest > plan.context_length:
        raise ConfigError(
            f"--context {args.context}: at most {plan.context_length - largest} leave room for "
            f"a tree of {largest} nodes"
        )
    device = choose_device(config.device, 0)
    _say("loading")
    stage = build_stage(plan, 0, device, lambda done, total: None)
    speed = measure_speed(device, plan.dtype, int8=config.load_in_8bit)
    costs = measure(stage, args.context, args.rounds)
    # Both before and after: the machine may have been busy with something else at one time.
    speed = speed.best_of(measure_speed(device, plan.dtype, int8=config.load_in_8bit))
    work = {cost.nodes: step_work(stage, cost.nodes, args.context) for cost in costs}
    where = machine(args.threads, ("torch",))
    _report(where, args.context, speed, costs, work)
    return ExitCode.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jupiter bench step", description=__doc__.split("\n")[0].partition(": ")[2]
    )
    add_config_options(parser)
    parser.add_argument("--context", type=int, default=256, metavar="N", help="tokens before")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="steps of each size")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    return parser


def measure(stage: Stage, context: int, rounds: int) -> list[Cost]:
    """Steps of each size in turns, `rounds` of each, behind a prompt of `context` tokens."""
    from engine.decoding.tree import MC_63, build_tree
    from engine.pipeline.batch import Entry, Judge

    vocabulary = stage.model.config.vocab_size

    def entry(start: int, parents: Sequence[int], judge: Judge, width: int) -> Entry:
        tokens = [(start + 7 * i) % vocabulary for i in range(len(parents))]
        return Entry(0, start, tokens, list(parents), judge, draft_width=width)

    stage.run([entry(0, range(-1, context - 1), Judge.NONE, 0)], None)
    # The shape is of no weight here, only the number of nodes: deeper than the heads will do.
    trees = [build_tree(MC_63[: nodes - 1], 4) for nodes in NODES]
    width = 0 if stage.model.heads.num_heads == 0 else 1
    times: list[list[tuple[float, float]]] = [[] for _ in trees]
    for _ in range(rounds + 1):
        for tree, found in zip(trees, times, strict=True):
            step = entry(context, tree.parents, Judge.TREE, width * tree.width)
            began = time.perf_counter()
            hidden = stage.run([step], None)
            passed = time.perf_counter()
            stage.judge([step], hidden)
            found.append((passed - began, time.perf_counter() - passed))
    # The first round is a warm-up.
    return [
        Cost(
            tree.size,
            1000 * statistics.median(layers for layers, _ in found[1:]),
            1000 * statistics.median(judge for _, judge in found[1:]),
        )
        for tree, found in zip(trees, times, strict=True)
    ]


def _report(
    where: str, context: int, speed: Speed, costs: Sequence[Cost], work: dict[int, Work]
) -> None:
    print(where)
    print(
        f"{speed.bytes_per_s / 1e9:.1f} GB/s from memory, "
        f"{speed.operations_per_s / 1e9:.0f} billion operations/s ({speed.kind}); "
        f"{context} tokens in the context\n"
    )
    print("| nodes | step, ms | layers | head | bytes, ms | operations, ms | step / floor |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    steps: list[dict[str, Any]] = []
    for cost in costs:
        needed = work[cost.nodes]
        bytes_ms = 1000 * needed.bytes / speed.bytes_per_s
        operations_ms = 1000 * needed.operations / speed.operations_per_s
        over = cost.step_ms / max(bytes_ms, operations_ms)
        print(
            f"| {cost.nodes} | {cost.step_ms:.1f} | {cost.layers_ms:.1f} | {cost.judge_ms:.1f} "
            f"| {bytes_ms:.1f} | {operations_ms:.1f} | {over:.1f} |"
        )
        told = {
            "step_ms": cost.step_ms,
            "layers_ms": cost.layers_ms,
            "judge_ms": cost.judge_ms,
            "floor_bytes_ms": bytes_ms,
            "floor_operations_ms": operations_ms,
        }
        steps.append({"nodes": cost.nodes, **{key: round(ms, 3) for key, ms in told.items()}})
    line = {
        "bench": "step",
        "steps": steps,
        "bytes_per_s": round(speed.bytes_per_s),
        "operations_per_s": round(speed.operations_per_s),
        "operations_in": speed.kind,
        "context": context,
        "machine": where,
    }
    print(json.dumps(line, ensure_ascii=False), flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
