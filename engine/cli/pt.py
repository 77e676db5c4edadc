"""`jupiter pt`: continued pretraining, loss on every token."""

from __future__ import annotations

from collections.abc import Sequence

from engine.cli.training import train


def main(words: Sequence[str]) -> int:
    """Run the command with the words that follow it; returns the exit code."""
    return train(words, "pt", "Train all weights of the model on whole texts.")
