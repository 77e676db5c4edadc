"""What stages take besides their work, from answers that were taken on them.

A profile's other figures are of stages and links by themselves. What is left of an answer's time is
making and reading messages, scheduling, text and events, and waiting for a core.
"""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from engine.config import JupiterConfig
from engine.planning.answers import Took
from engine.planning.chunks import prefill_chunks
from engine.planning.planner import Prediction, predict
from engine.planning.profiles import Profile
from engine.planning.setup import costs_of, met, workload

HALVINGS = 20


def with_overhead(config: JupiterConfig, folder: Path, profile: Profile, took: Took) -> Profile:
    """The profile with `stage_ms` and `busy_ms`, so that it predicts the answers of `config`.

    As it was where no answer was long enough to tell.
    """
    if not took.step_s:
        return profile
    split = config.stage_num_hidden_layers_list
    load = met(workload(config, folder, took.rows, 1), took)
    chunks = prefill_chunks(
        took.rows, len(split), config.num_sub_sequences, config.max_sub_sequence_len
    )

    def predicted(profile: Profile) -> Prediction:
        return predict(costs_of(config, folder, profile), split, load, chunks)

    left_s = took.usual_step_s - predicted(profile).step.seconds
    profile = _with_stage_ms(profile, 1000.0 * max(0.0, left_s) / len(split))
    low, high = 0.0, 1000.0 * took.usual_ttft_s / len(chunks)
    if len(split) == 1 or len(chunks) == 1:
        return profile
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if predicted(_with_busy_ms(profile, middle)).ttft_s < took.usual_ttft_s:
            low = middle
        else:
            high = middle
    return _with_busy_ms(profile, low)


def _with_stage_ms(profile: Profile, ms: float) -> Profile:
    return replace(profile, devices=tuple(replace(each, stage_ms=ms) for each in profile.devices))


def _with_busy_ms(profile: Profile, ms: float) -> Profile:
    return replace(profile, links=tuple(replace(each, busy_ms=ms) for each in profile.links))
