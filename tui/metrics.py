"""The figures that a person sees: measured, or "n/a"; never a zero for what is unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.protocol import Finished, Started

UNKNOWN = "n/a"


@dataclass(frozen=True)
class Figures:
    """What was measured of one answer so far; None where nothing was."""

    ttft_s: float | None = None
    """From sending to the first token, in seconds."""
    tokens_per_s: float | None = None
    tokens_per_step: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def prefilled_tokens(self) -> int | None:
        """Prompt tokens that had to be computed in this turn."""
        if self.prompt_tokens is None or self.cached_tokens is None:
            return None
        return self.prompt_tokens - self.cached_tokens


class Meter:
    """Measures one answer as its tokens arrive; times are seconds of one monotonic clock."""

    def __init__(self, sent_at: float) -> None:
        self._sent_at = sent_at
        self._first_at: float | None = None
        self._first_tokens = 0
        self.figures = Figures()

    def started(self, event: Started) -> None:
        """The engine took the request in."""
        self.figures = replace(
            self.figures, prompt_tokens=event.prompt_tokens, cached_tokens=event.cached_tokens
        )

    def tokens(self, count: int, at: float) -> None:
        """`count` tokens arrived at `at`; the rate is that of the tokens after the first."""
        total = (self.figures.completion_tokens or 0) + count
        self.figures = replace(self.figures, completion_tokens=total)
        if self._first_at is None:
            self._first_at, self._first_tokens = at, count
            self.figures = replace(self.figures, ttft_s=at - self._sent_at)
        elif at > self._first_at:
            rate = (total - self._first_tokens) / (at - self._first_at)
            self.figures = replace(self.figures, tokens_per_s=rate)

    def finished(self, event: Finished) -> None:
        """The engine's own figures take the place of those seen from here."""
        metrics, seen = event.metrics, self.figures
        self.figures = Figures(
            ttft_s=seen.ttft_s if metrics.ttft_s is None else metrics.ttft_s,
            tokens_per_s=seen.tokens_per_s
            if metrics.tokens_per_s is None
            else metrics.tokens_per_s,
            tokens_per_step=metrics.mean_accepted_len,
            prompt_tokens=event.prompt_tokens,
            cached_tokens=event.cached_tokens,
            completion_tokens=event.completion_tokens,
        )


def seconds(value: float | None) -> str:
    """A duration: `38 ms`, `0.21 s`, `12.3 s`, `2 min 05 s`."""
    if value is None:
        return UNKNOWN
    if value < 0.0995:
        return f"{value * 1000:.0f} ms"
    if value < 9.995:
        return f"{value:.2f} s"
    if value < 99.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s"


def rate(value: float | None) -> str:
    """Tokens per second: `9.42 tok/s`, `24.5 tok/s`, `132 tok/s`."""
    if value is None:
        return f"{UNKNOWN} tok/s"
    return f"{_three_digits(value)} tok/s"


def per_step(value: float | None) -> str:
    """Tokens that one decode step yields: `1.00 tok/step`."""
    return f"{UNKNOWN} tok/step" if value is None else f"{value:.2f} tok/step"


def count(value: int | None) -> str:
    """A number of tokens with thousands apart: `2,048`."""
    return UNKNOWN if value is None else f"{value:,}"


def prefill(figures: Figures) -> str:
    """Prompt tokens computed in this turn, and those still in the cache: `34 new, 120 cached`."""
    return f"{count(figures.prefilled_tokens)} new, {count(figures.cached_tokens)} cached"


def split(layers: Sequence[int]) -> str:
    """Layers per stage: `15|15`."""
    return "|".join(str(n) for n in layers)


def layer_range(first: int, number: int) -> str:
    """The layers of a stage, counted from 0: `0–14`, or `7` for a single one."""
    return f"{first}" if number == 1 else f"{first}–{first + number - 1}"


def bar(done: int, total: int, width: int) -> tuple[str, str]:
    """The filled and the empty part of a progress bar `width` cells wide."""
    filled = 0 if total <= 0 else min(width, width * done // total)
    return "━" * filled, "─" * (width - filled)


def _three_digits(value: float) -> str:
    if value < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
