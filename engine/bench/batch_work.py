"""What the batch bench asks: 64 prompts with seeded lengths of their answers."""

from __future__ import annotations

import random

from engine.bench.prompts import OWN, Chat
from engine.protocol import Message

COUNT = 64
SHORTEST, LONGEST = 16, 256
SEED = 6
"""Of the lengths: the same in every run and on every machine."""

# The project's own questions, asked from different points of view, so that prompts differ in
# length and no KV cache is of use to another.
VIEWS = (
    "",
    "Answer as if to a child of ten. ",
    "You have one minute. ",
    "I have asked this before and did not understand the answer; please be patient with me. ",
    "Begin with what matters most. ",
    "For the newsletter of our sports club, which nobody reads to the end: ",
    "Give an example first. ",
    "My grandmother, who was a teacher for forty years and hears badly, would like to know. ",
)


def prompts() -> list[Chat]:
    """As many chats as there are answers."""
    return [(Message("user", view + text),) for view in VIEWS for text in OWN]


def lengths(count: int, *, longest: int = LONGEST, seed: int = SEED) -> list[int]:
    """`max_tokens` of each answer, even over 16 to `longest`."""
    draw = random.Random(seed)
    return [draw.randint(min(SHORTEST, longest), longest) for _ in range(count)]
