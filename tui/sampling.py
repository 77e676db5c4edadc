"""The sampling parameters of a conversation, as text that is typed and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from engine.config import JupiterConfig
from engine.protocol import SamplingParams

FIELDS = ("temperature", "top_p", "max_tokens", "seed")
RULES = {
    "temperature": "a number, 0 (always the likeliest token) or more",
    "top_p": "a number above 0 and at most 1",
    "max_tokens": "a whole number, 1 or more",
    "seed": "a whole number",
}
LARGEST_SEED: int = 2**63 - 1


def checked(field: str, text: str) -> float | int | None:
    """The value that was typed into a field; None for an empty one, which leaves it to the config.

    Raises ValueError with what would be right.
    """
    text = text.strip()
    if not text:
        return None
    try:
        value: float | int = int(text) if field in ("max_tokens", "seed") else float(text)
    except ValueError:
        raise ValueError(RULES[field]) from None
    if not _allowed(field, value):
        raise ValueError(RULES[field])
    return value


def _allowed(field: str, value: float | int) -> bool:
    match field:
        case "temperature":
            return value >= 0 and math.isfinite(value)
        case "top_p":
            return 0 < value <= 1
        case "max_tokens":
            return 1 <= value <= LARGEST_SEED
        case _:
            return -LARGEST_SEED <= value <= LARGEST_SEED


def shown(params: SamplingParams, field: str) -> str:
    """The text of a field; empty where the config decides."""
    value = getattr(params, field)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def with_values(params: SamplingParams, values: Mapping[str, float | int | None]) -> SamplingParams:
    """`params` with some fields replaced."""
    return msgspec.structs.replace(params, **values)


def left_to_config(field: str, config: JupiterConfig) -> str:
    """What applies where a field is empty, in a few words."""
    match field:
        case "temperature":
            greedy = config.sampling == "greedy"
            return "not used (greedy)" if greedy else f"{config.temperature:g}"
        case "top_p":
            return (
                f"{config.top_p:g}"
                if config.sampling == "nucleus"
                else f"not used ({config.sampling})"
            )
        case "max_tokens":
            return (
                "what the context holds"
                if config.max_new_tokens is None
                else str(config.max_new_tokens)
            )
        case _:
            return "another one each time"


def to_go_on(params: SamplingParams, config: JupiterConfig, answered: int) -> SamplingParams:
    """`params` for an answer that goes on after `answered` tokens: the limit counts from there."""
    limit = params.max_tokens or config.max_new_tokens
    return params if limit is None else msgspec.structs.replace(params, max_tokens=answered + limit)
