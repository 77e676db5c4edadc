"""What to run: a split and its chunks for a stated aim, and what any split is predicted to take.

Pure functions over a profile. The searches are in partition.py, the costs in costs.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engine.errors import ConfigError
from engine.planning.chunks import prefill_chunks
from engine.planning.costs import Costs
from engine.planning.partition import best_chunks, best_prefill, split_for_steps
from engine.planning.simulator import Simulated, simulate

Aim = Literal["ttft", "latency", "throughput"]
NEAR = 0.005
"""Splits that differ by a smaller share are alike: the one with the most equal stages is taken."""
CHUNKS = 16
"""A prompt is cut at so many places at most, evenly apart: finer ones gain next to nothing."""
MIN_UNIT = 32


@dataclass(frozen=True)
class Draft:
    """A draft tree that a decode step may take."""

    nodes: int = 1
    depth: int = 0
    tokens: float = 1.0
    """Expected of a step, per sequence."""


PLAIN = (Draft(),)


@dataclass(frozen=True)
class Workload:
    """What is planned for."""

    prompt: int = 512
    """Tokens of a prompt."""
    context: int = 576
    """Tokens before a decode step."""
    sequences: int = 16
    """At once, for throughput."""
    drafts: Sequence[Draft] = PLAIN
    num_heads: int = 0
    longest_chunk: int = 128


@dataclass(frozen=True)
class Prediction:
    """What a split with its chunks is predicted to take; seconds and bytes."""

    split: tuple[int, ...]
    chunks: tuple[int, ...]
    prefill: Simulated
    """Of the prompt, until its first token."""
    step: Simulated
    """A decode step of one sequence."""
    draft: Draft
    """The tree with the most tokens per second for one sequence."""
    tokens_per_s: float
    """Of all sequences together, micro-batches filling all stages."""
    memory: tuple[int, ...]
    """Of each stage."""

    @property
    def ttft_s(self) -> float:
        """From a prompt to its first token."""
        return self.prefill.seconds

    @property
    def token_s(self) -> float:
        """From one token to the next, of one sequence."""
        return self.step.seconds / self.draft.tokens

    @property
    def bubble(self) -> float:
        """Share of the stages' time without work, in the prefill."""
        return self.prefill.bubble(len(self.split))


def plan(costs: Costs, aim: Aim, load: Workload) -> Prediction:
    """The best split and chunks for an aim, and what they take.

    `ttft`: time to the first token of the prompt. `latency`: time per token of one sequence.
    `throughput`: tokens per second of `load.sequences`, in as many micro-batches as stages.

    Raises ConfigError where no split fits into memory.
    """
    if costs.stages > costs.num_layers:
        raise ConfigError(
            f"{costs.stages} stages are more than the {costs.num_layers} layers of the model"
        )
    if aim == "ttft":
        found = best_prefill(costs, load.prompt, unit=unit(load.prompt), longest=load.longest_chunk)
        return predict(costs, found.split, load, found.chunks)
    per_batch = 1 if aim == "latency" else math.ceil(load.sequences / costs.stages)
    ways = []
    for draft in load.drafts:
        seconds, split = split_for_steps(
            costs,
            draft.nodes * per_batch,
            load.context,
            judge_s=_judge_s(costs, load, draft, per_batch),
            steady=aim == "throughput",
            tolerance=NEAR,
        )
        ways.append((seconds / draft.tokens, split))
    return predict(costs, min(ways)[1], load)


def predict(
    costs: Costs,
    split: Sequence[int],
    load: Workload,
    chunks: Sequence[int] | None = None,
) -> Prediction:
    """What a split takes; `chunks` of the prompt, or else the best ones."""
    if chunks is None:
        found = best_chunks(
            costs, split, load.prompt, unit=unit(load.prompt), longest=load.longest_chunk
        )
        assert found is not None
        chunks = found[1]
    flights = costs.stages + 1 if costs.stages > 1 else 1
    prefill = simulate(*costs.prefill(split, chunks), costs.sharing, flights=flights)
    steps = [(_step(costs, split, load, draft), draft) for draft in load.drafts]
    step, draft = min(steps, key=lambda each: each[0].seconds / each[1].tokens)
    return Prediction(
        split=tuple(split),
        chunks=tuple(chunks),
        prefill=prefill,
        step=step,
        draft=draft,
        tokens_per_s=max(_tokens_per_s(costs, split, load, draft) for draft in load.drafts),
        memory=tuple(costs.memory(rank, layers) for rank, layers in enumerate(split)),
    )


def config_chunks(load: Workload, world: int, num_sub_sequences: int) -> list[int]:
    """The chunks that the config's two keys alone make of the prompt."""
    return prefill_chunks(load.prompt, world, num_sub_sequences, load.longest_chunk)


def unit(rows: int) -> int:
    """Chunks are multiples of so many rows."""
    return MIN_UNIT * math.ceil(rows / (MIN_UNIT * CHUNKS))


def _judge_s(costs: Costs, load: Workload, draft: Draft, sequences: int) -> float:
    device = costs.profile.devices[-1]
    drafting = device.drafting(draft.depth, load.num_heads)
    return device.judge_s(draft.nodes, sequences=sequences, drafting=drafting)


def _step(costs: Costs, split: Sequence[int], load: Workload, draft: Draft) -> Simulated:
    judge_s = _judge_s(costs, load, draft, 1)
    work, hops = costs.decode(split, draft.nodes, load.context, judge_s)
    return simulate([work], [hops], costs.sharing)


def _tokens_per_s(costs: Costs, split: Sequence[int], load: Workload, draft: Draft) -> float:
    """With micro-batches in every stage, after the first ones: some rounds are simulated."""
    sequences = math.ceil(load.sequences / costs.stages)
    judge_s = _judge_s(costs, load, draft, sequences)
    work, hops = costs.decode(
        split, draft.nodes * sequences, load.context, judge_s, crowded=costs.stages > 1
    )
    rounds, stages = 6, costs.stages
    landed = simulate(
        [work] * (rounds * stages), [hops] * (rounds * stages), costs.sharing, flights=stages
    ).landed
    half = len(landed) // 2
    seconds = (landed[-1] - landed[half - 1]) / (len(landed) - half)
    return sequences * draft.tokens / seconds
