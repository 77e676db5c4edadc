"""What a split would take in time, from what the live one was measured to take. Pure functions.

Nothing is guessed: where a figure that is needed was not measured, the prediction is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.planning.chunks import prefill_chunks


@dataclass(frozen=True)
class StageSpeed:
    """One live stage as measured; times in seconds, None where there was nothing to measure."""

    layers: int
    device: str = ""
    """Where it runs; stages of one name share the device and take turns on it."""
    step_s: float | None = None
    """Computing of one decode step, `head_s` included."""
    head_s: float = 0.0
    """Of it, `lm_head`, heads and acceptance; 0 on all stages but the last."""
    row_s: float | None = None
    """Computing of one prefilled row."""

    @property
    def layer_s(self) -> float | None:
        """Computing of one decode step in one layer."""
        return None if self.step_s is None else (self.step_s - self.head_s) / self.layers

    @property
    def layer_row_s(self) -> float | None:
        """Computing of one prefilled row in one layer."""
        return None if self.row_s is None else self.row_s / self.layers


@dataclass(frozen=True)
class Measured:
    """The live engine as measured."""

    stages: tuple[StageSpeed, ...] = ()
    link_s: float | None = None
    """One hop from a stage to the next, and the way back from the last to the first."""
    tokens_per_step: float | None = None
    prompt_rows: int | None = None
    """Rows that the latest prompt had to be prefilled with."""

    @property
    def split(self) -> tuple[int, ...]:
        """Layers per stage."""
        return tuple(stage.layers for stage in self.stages)


@dataclass(frozen=True)
class Timing:
    """Predicted for a split; seconds, None where something needed was not measured."""

    steps: tuple[float | None, ...]
    """Computing of one decode step on each stage."""
    token_s: float | None
    """From one token to the next."""
    ttft_s: float | None
    """From a prompt of `Measured.prompt_rows` new rows to its first token."""


def predict(
    split: Sequence[int], measured: Measured, *, num_sub_sequences: int, max_sub_sequence_len: int
) -> Timing:
    """The times of `split`, with the config's two keys that rule prefill chunks."""
    devices = place(len(split), measured.stages)
    steps = stage_step_s(split, measured)
    hops = len(split) if len(split) > 1 else 0
    links = 0.0 if not hops else None if measured.link_s is None else hops * measured.link_s
    token_s = None
    if links is not None and measured.tokens_per_step:
        computing = _sum(steps)
        token_s = None if computing is None else (computing + links) / measured.tokens_per_step
    ttft_s = None
    if links is not None and measured.prompt_rows:

        def chunks(world: int) -> list[int]:
            rows = measured.prompt_rows or 0
            return prefill_chunks(rows, world, num_sub_sequences, max_sub_sequence_len)

        rates = _row_rates(devices, measured, chunks(len(measured.stages)))
        head_s = measured.stages[-1].head_s
        if rates is not None:
            work = [layers * rate for layers, rate in zip(split, rates, strict=True)]
            ttft_s = head_s + links + makespan(work, chunks(len(split)), devices)
    return Timing(tuple(steps), token_s, ttft_s)


def stage_step_s(split: Sequence[int], measured: Measured) -> list[float | None]:
    """Computing of one decode step on each stage of `split`, in seconds."""
    devices = place(len(split), measured.stages)
    speeds = _by_device(measured.stages, [stage.layer_s for stage in measured.stages])
    found: list[float | None] = []
    for rank, layers in enumerate(split):
        layer_s = speeds.get(devices[rank])
        step_s = None if layer_s is None else layers * layer_s
        if step_s is not None and rank == len(split) - 1:
            last = measured.stages[-1]
            # The heads' time is known for the device that they are on now, and for no other.
            step_s = step_s + last.head_s if last.device == devices[rank] else None
        found.append(step_s)
    return found


def place(world: int, live: Sequence[StageSpeed]) -> list[str | None]:
    """The device of each of `world` stages; None for a new stage that could be anywhere."""
    known = {stage.device for stage in live}
    new = next(iter(known)) if len(known) == 1 else None
    return [live[rank].device if rank < len(live) else new for rank in range(world)]


def makespan(
    row_s: Sequence[float], chunks: Sequence[int], devices: Sequence[object] | None = None
) -> float:
    """Seconds until the last of `chunks` has left the last stage.

    `row_s[r]` is what a row takes on stage r. A stage works on one chunk at a time, and so do
    all stages of one device; without `devices` every stage has one of its own.
    """
    where = list(devices) if devices is not None else list(range(len(row_s)))
    arrived = [0.0] * len(chunks)
    # As the engine does it: a stage that is free takes the earliest chunk that is there.
    free: dict[object, float] = dict.fromkeys(where, 0.0)
    order = sorted((c + r, r, c) for c in range(len(chunks)) for r in range(len(row_s)))
    for _, rank, chunk in order:
        began = max(arrived[chunk], free[where[rank]])
        arrived[chunk] = free[where[rank]] = began + chunks[chunk] * row_s[rank]
    return arrived[-1]


def _row_rates(
    devices: Sequence[str | None], measured: Measured, live_chunks: Sequence[int]
) -> list[float] | None:
    """Seconds of one row in one layer on each device, when nothing else runs on it."""
    own = [stage.layer_row_s for stage in measured.stages]
    if None in own:
        return None
    crowd = _crowding(measured.stages, live_chunks)
    speeds = _by_device(
        measured.stages,
        [
            None if rate is None else rate / crowd[stage.device]
            for rate, stage in zip(own, measured.stages, strict=True)
        ],
    )
    rates = [speeds.get(device) for device in devices]
    return None if None in rates else [rate for rate in rates if rate is not None]


def _crowding(stages: Sequence[StageSpeed], chunks: Sequence[int]) -> dict[str | None, float]:
    """How many stages of a device computed at once on average, as chunks followed each other.

    Each then had only its part of the device, so what it was measured to take is so much longer.
    """
    row_s = [stage.row_s or 0.0 for stage in stages]
    total = makespan(row_s, chunks)
    rows = sum(chunks)
    crowd: dict[str | None, float] = {}
    for device in {stage.device for stage in stages}:
        work = sum(s * rows for s, at in zip(row_s, stages, strict=True) if at.device == device)
        crowd[device] = max(1.0, work / total) if total else 1.0
    return crowd


def _by_device(
    stages: Sequence[StageSpeed], values: Sequence[float | None]
) -> dict[str | None, float]:
    """The mean of the stages' values on each device, weighted by layers; None values left out."""
    sums: dict[str | None, tuple[float, int]] = {}
    for stage, value in zip(stages, values, strict=True):
        if value is not None:
            total, layers = sums.get(stage.device, (0.0, 0))
            sums[stage.device] = (total + value * stage.layers, layers + stage.layers)
    return {device: total / layers for device, (total, layers) in sums.items()}


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
