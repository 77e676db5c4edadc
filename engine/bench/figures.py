"""What was measured of one answer, what many come to, and how engines compare. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

OURS = "jupiter, 1 stage"
TWO_STAGES = "jupiter, 2 stages"
PLAIN = "jupiter, 1 stage, plain decoding"
FLOAT32 = "transformers, float32"
BFLOAT16 = "transformers, bfloat16"
LOOKUP = "transformers, prompt lookup"
F16 = "llama.cpp, F16"
Q4_1 = "llama.cpp, Q4_1"
PLAYERS = (OURS, TWO_STAGES, PLAIN, FLOAT32, BFLOAT16, LOOKUP, F16, Q4_1)

# Each ratio is the first one's tokens/s over the fastest of the others'.
RATIOS: dict[str, tuple[str, tuple[str, ...]]] = {
    "vs_transformers": (OURS, (FLOAT32, BFLOAT16)),
    "vs_transformers_lookup": (OURS, (LOOKUP,)),
    "vs_llamacpp_f16": (OURS, (F16,)),
    "vs_llamacpp_q4_1": (OURS, (Q4_1,)),
    "vs_plain": (OURS, (PLAIN,)),
    "world2_vs_world1": (TWO_STAGES, (OURS,)),
}


class Run(msgspec.Struct, frozen=True):
    """One answer: its tokens, and what they took as its asker saw it."""

    tokens: tuple[int, ...]
    ttft_s: float
    """From the question to the first token."""
    decode_tokens: int
    """Tokens that came after the first arrival (which may bring several)."""
    decode_s: float
    """From the first arrival to the end."""
    steps: int
    """Forwards of the model that the later tokens took."""


def run_of(tokens: Sequence[int], arrivals: Sequence[float], first: int) -> Run:
    """The run whose tokens came at `arrivals`, seconds after the question, a step each.

    `first` is the number of tokens that the first of them brought.
    """
    return Run(
        tokens=tuple(tokens),
        ttft_s=arrivals[0],
        decode_tokens=len(tokens) - first,
        decode_s=arrivals[-1] - arrivals[0],
        steps=len(arrivals) - 1,
    )


@dataclass(frozen=True)
class Figures:
    """What the answers of one engine come to; None where nothing was decoded."""

    tokens_per_s: float | None
    tokens_per_step: float | None
    ms_per_step: float | None
    ttft_ms: float | None


def figures(runs: Sequence[Run]) -> Figures:
    """Sums over sums, so that a long answer counts for more; time to first token as the median."""
    tokens = sum(run.decode_tokens for run in runs)
    seconds = sum(run.decode_s for run in runs)
    steps = sum(run.steps for run in runs)
    waits = sorted(run.ttft_s for run in runs)
    return Figures(
        tokens_per_s=tokens / seconds if seconds else None,
        tokens_per_step=tokens / steps if steps else None,
        ms_per_step=1000 * seconds / steps if steps else None,
        ttft_ms=1000 * (waits[len(waits) // 2] + waits[~(len(waits) // 2)]) / 2 if waits else None,
    )


def ratios(
    measured: Mapping[str, Figures], missing: Mapping[str, str]
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Every ratio, None where an engine is missing; and the reason for each None.

    Args:
        measured: figures by player.
        missing: why a player has none.
    """
    found: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for name, (mine, others) in RATIOS.items():
        rates = {p: f.tokens_per_s for p, f in measured.items() if f.tokens_per_s}
        there = [rates[other] for other in others if other in rates]
        if mine in rates and there:
            found[name] = round(rates[mine] / max(there), 3)
            continue
        found[name] = None
        absent = next(p for p in (mine, *others) if p not in rates)
        reasons[name] = f"{absent}: {missing.get(absent, 'no token was decoded')}"
    return found, reasons


def table(measured: Mapping[str, Figures]) -> list[str]:
    """The lines of a Markdown table, an engine each."""
    lines = [
        "| engine | tokens/s | tokens per step | ms per step | first token, ms |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, one in measured.items():
        cells = (
            _cell(one.tokens_per_s, 1),
            _cell(one.tokens_per_step, 2),
            _cell(one.ms_per_step, 1),
            _cell(one.ttft_ms, 0),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"
