"""Figures of several sequences or parts as one answer's."""

from __future__ import annotations

from collections.abc import Sequence

from engine.protocol import Metrics


def joined(parts: Sequence[Metrics]) -> Metrics:
    """The figures of an answer that came in parts; pauses between them do not count."""
    count = sum(part.decode_steps for part in parts)
    tokens = sum(map(_decoded, parts))
    timed = [part for part in parts if part.tokens_per_s]
    seconds = sum(_decoded(part) / (part.tokens_per_s or 1) for part in timed)
    return Metrics(
        ttft_s=next((part.ttft_s for part in parts if part.ttft_s is not None), None),
        tokens_per_s=sum(map(_decoded, timed)) / seconds if seconds else None,
        decode_steps=count,
        mean_accepted_len=tokens / count if count else None,
        proposed_per_head=_sums([part.proposed_per_head for part in parts]),
        accepted_per_head=_sums([part.accepted_per_head for part in parts]),
    )


def _decoded(part: Metrics) -> float:
    """Tokens that its decode steps emitted."""
    return (part.mean_accepted_len or 0.0) * part.decode_steps


def _sums(rows: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Column sums of rows of any length."""
    width = max(map(len, rows), default=0)
    return tuple(sum(row[i] for row in rows if i < len(row)) for i in range(width))
