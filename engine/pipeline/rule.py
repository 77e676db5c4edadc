"""How a request's tokens are chosen."""

from __future__ import annotations

import math
import secrets

from engine.config import JupiterConfig
from engine.decoding.accept import GREEDY, NUCLEUS, RULES, AcceptRule
from engine.errors import PromptError
from engine.protocol import SamplingParams


def accept_rule(params: SamplingParams, config: JupiterConfig) -> AcceptRule:
    """How a request's tokens are chosen: its own parameters before the config's.

    A request that names top_p asks for nucleus sampling, whatever the config's rule is.
    Raises PromptError for a value out of range.
    """
    temperature = config.temperature if params.temperature is None else params.temperature
    top_p = config.top_p if params.top_p is None else params.top_p
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise PromptError(f"temperature {temperature}: must be 0 or more")
    if not 0 < top_p <= 1:
        raise PromptError(f"top_p {top_p}: must be above 0 and at most 1")
    if params.max_tokens is not None and params.max_tokens < 1:
        raise PromptError(f"max_tokens {params.max_tokens}: must be 1 or more")
    seed = secrets.randbits(62) if params.seed is None else params.seed
    rule = RULES[config.sampling]
    if temperature == 0:
        rule = GREEDY
    elif params.top_p is not None:
        rule = NUCLEUS
    return AcceptRule(
        rule=rule,
        temperature=temperature,
        top_p=top_p,
        posterior_threshold=config.posterior_threshold,
        posterior_alpha=config.posterior_alpha,
        seed=(seed + 2**63) % 2**64 - 2**63,
    )
