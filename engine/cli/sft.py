"""`jupiter sft`: supervised fine-tuning, loss on the assistant's tokens."""

from __future__ import annotations

from collections.abc import Sequence

from engine.cli.training import train


def main(words: Sequence[str]) -> int:
    """Run the command with the words that follow it; returns the exit code."""
    return train(words, "sft", "Train all weights of the model on the answers of conversations.")
