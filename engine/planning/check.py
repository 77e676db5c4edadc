"""Is the planner right? Three splits are run, and predicted times put beside those they take."""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace as with_keys

from engine.bench.prompts import OWN
from engine.checkpoint.tokenizer import ensure_tokenizer
from engine.client import EngineClient
from engine.config import JupiterConfig
from engine.errors import ConfigError, EngineError
from engine.model.config import ModelConfig
from engine.planning.chunks import prefill_chunks
from engine.planning.costs import Costs
from engine.planning.planner import Draft, Prediction, Workload, predict
from engine.protocol import Failed, Finished, Message, SamplingParams
from engine.text import TextCodec

ANSWERS = 5
ANSWER_TOKENS = 64


@dataclass
class Took:
    """What answers of one split took."""

    ttft_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    tokens_per_step: list[float] = field(default_factory=list)
    rows: int = 0
    """Prompt tokens that were computed."""
    nodes: int = 1
    """Of the draft tree."""


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
    client, took = EngineClient(config), Took()
    try:
        await client.start()
        for index, text in enumerate(prompts):
            params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
            stream = client.submit(messages=[Message("user", text)], params=params)
            async for event in stream:
                if isinstance(event, Failed):
                    raise EngineError(event.message)
                if isinstance(event, Finished) and index:  # the first is to warm up
                    _add(took, event)
        took.nodes = client.tree.nodes if client.tree else client.ready.tree_size  # type: ignore[union-attr]
    finally:
        await client.stop()
    return took


def _add(took: Took, done: Finished) -> None:
    metrics = done.metrics
    if metrics.ttft_s is None or not metrics.tokens_per_s or not metrics.mean_accepted_len:
        raise EngineError("an answer was too short to be measured")
    took.ttft_s.append(metrics.ttft_s)
    took.step_s.append(metrics.mean_accepted_len / metrics.tokens_per_s)
    took.tokens_per_step.append(metrics.mean_accepted_len)
    took.rows = done.prompt_tokens - done.cached_tokens


def prompts_of(config: JupiterConfig, folder: Path, tokens: int) -> list[str]:
    """Chat questions whose prompts have about so many tokens, each with another beginning."""
    codec = TextCodec(
        folder, ensure_tokenizer(folder), ModelConfig.from_folder(folder).eos_token_id
    )
    found = []
    for turn in range(ANSWERS + 1):
        asked = [*OWN[turn % len(OWN) :], *OWN[: turn % len(OWN)]]
        text, size = f"Question {turn}.", 0
        while size < tokens:
            text += " " + asked[len(text) % len(asked)]
            size = len(
                codec.encode(codec.render([Message("user", text)]), add_special_tokens=False)
            )
        found.append(text)
    if size + ANSWER_TOKENS > config.max_kv_cache_length:
        raise ConfigError(f"--prompt {tokens}: with an answer the context does not hold it")
    return found


def check(
    config: JupiterConfig, folder: Path, costs: Costs, load: Workload, best: Prediction
) -> list[dict[str, object]]:
    """Run the splits, print predicted beside measured, and return the same for the JSON line."""
    prompts = prompts_of(config, folder, load.prompt)
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
    found = predict(costs, split, _met(load, took), chunks)
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


def _met(load: Workload, took: Took) -> Workload:
    from dataclasses import replace

    nearest = min(load.drafts, key=lambda draft: abs(draft.nodes - took.nodes))
    draft = Draft(nearest.nodes, nearest.depth, statistics.fmean(took.tokens_per_step))
    return replace(load, prompt=took.rows, context=took.rows + ANSWER_TOKENS // 2, drafts=[draft])


def _per_token(took: Took) -> list[float]:
    return [s / n for s, n in zip(took.step_s, took.tokens_per_step, strict=True)]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
