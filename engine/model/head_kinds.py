"""Kinds of draft heads, by what they see. Torch-free."""

from __future__ import annotations

from typing import Literal

HeadKind = Literal["resblock", "root", "hydra"]
"""What a head sees: the last hidden state alone (Cai et al. 2024); also the token chosen from it,
the root of the draft tree; or also the tokens drafted between the root and its own, as Hydra's
sequential heads do (Ankner et al. 2024)."""


def tokens_seen(kind: HeadKind, head: int) -> int:
    """How many tokens behind its hidden state head `head` (from 0) sees."""
    return {"resblock": 0, "root": 1, "hydra": head + 1}[kind]
