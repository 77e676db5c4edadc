"""Is the planner right? Three splits are run, and predicted times put beside those they take."""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace as with_keys

from engine.client import EngineClient
from engine.config import JupiterConfig
from engine.errors import ConfigError, EngineError
from engine.planning.answers import ANSWER_TOKENS, Took, prompts_of, take_answers
from engine.planning.chunks import prefill_chunks
from engine.planning.costs import Costs
from engine.planning.planner import Prediction, Workload, predict
from engine.planning.setup import met

ANSWERS = 5


def splits_to_check(layers: int, planned: Sequence[int]) -> list[tuple[int, ...]]:
    """The planned split and two that differ from it: layers go to the last stage, or come from it.

    Fewer where there is one stage, or too few layers.
    """
    found = [tuple(planned)]
    for share in (layers // 6, -(layers // 6)):
        ends = planned[0] - share, planned[-1] + share
        if len(planned) > 1 and share and min(ends) > 0:
            found.append((ends[0], *planned[1:-1], ends[1]))
    return found


async def measure_split(
    config: JupiterConfig, prompts: Sequence[str], say: Callable[[str], None]
) -> Took:
    """Answers of an engine of `config`, one after the other; raises EngineError."""
    say(f"running {config.stage_num_hidden_layers_list}")
    client = EngineClient(config)
    try:
        await client.start()
        took = await take_answers(client, prompts)
    finally:
        await client.stop()
    if not took.step_s:
        raise EngineError("all answers were too short to be measured")
    return took


def check(
    config: JupiterConfig, folder: Path, costs: Costs, load: Workload, best: Prediction
) -> list[dict[str, object]]:
    """Run the splits, print predicted beside measured, and return the same for the JSON line."""
    if load.prompt + ANSWER_TOKENS > config.max_kv_cache_length:
        raise ConfigError(f"--prompt {load.prompt}: with an answer the context does not hold it")
    prompts = prompts_of(folder, load.prompt, ANSWERS + 1)
    told = []
    print("split, greedy: predicted, measured, predicted / measured")
    for split in splits_to_check(costs.num_layers, best.split):
        if not costs.fits(split):
            continue
        one = with_keys(config, stage_num_hidden_layers_list=list(split), num_stages=None)
        took = asyncio.run(measure_split(one, prompts, _say))
        told.append(_compare(one, costs, load, took))
    worst = max(
        abs(ratio - 1.0)
        for each in told
        for key, ratio in each.items()
        if key.endswith("_ratio") and isinstance(ratio, float)
    )
    print(f"largest error: {worst:.0%}")
    return told


def _compare(config: JupiterConfig, costs: Costs, load: Workload, took: Took) -> dict[str, object]:
    """One split: the same tree and prompt length are predicted as were met."""
    split = config.stage_num_hidden_layers_list
    rows = took.rows
    chunks = prefill_chunks(rows, len(split), config.num_sub_sequences, config.max_sub_sequence_len)
    found = predict(costs, split, met(load, took), chunks)
    pairs = {
        "ttft_ms": (1000 * found.ttft_s, 1000 * statistics.median(took.ttft_s)),
        "ms_per_token": (
            1000 * found.token_s,
            1000 * statistics.median(_per_token(took)),
        ),
    }
    told: dict[str, object] = {"split": split, "rows": rows, "nodes": took.nodes}
    told["tokens_per_step"] = round(statistics.fmean(took.tokens_per_step), 3)
    for name, (predicted, measured) in pairs.items():
        ratio = predicted / measured
        print(f"{split!s:>16} {name:>12}: {predicted:8.2f} {measured:8.2f} {ratio:6.2f}")
        told |= {
            f"{name}_predicted": round(predicted, 3),
            f"{name}_measured": round(measured, 3),
            f"{name}_ratio": round(ratio, 4),
        }
    return told


def _per_token(took: Took) -> list[float]:
    return [s / n for s, n in zip(took.step_s, took.tokens_per_step, strict=True)]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
