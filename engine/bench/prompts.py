"""What the decode bench asks: a file of chats, or a small set of the project's own."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import ConfigError
from engine.protocol import Message

Chat = tuple[Message, ...]
FILE_VARIABLE = "JUPITER_BENCH_FILE"

# One each of what people ask: prose, facts, steps, code, a table, rewriting, sums, a role.
OWN = (
    "Write a short letter to a neighbour whose cat keeps visiting our kitchen.",
    "What makes the tides higher on some days of the month than on others?",
    "How do I repair a bicycle tyre with a small hole? Give me numbered steps.",
    "Write a Python function that returns the longest word of a sentence, and explain it.",
    "Compare tea and coffee in a table with rows for taste, caffeine and preparation.",
    "Say this more politely: 'Your report is late again and half of the figures are wrong.'",
    "A baker makes 48 rolls an hour and sells three of every four. How many are left at night?",
    "You are a guide in a museum of old ships. Welcome a group of children and show them round.",
)
WARM_UP: Chat = (Message("user", "Tell me about the first railways and those who built them."),)
"""Asked before anything is measured; not one of the prompts, which a cache would remember."""


def choose_prompts(file: str | None, limit: int | None) -> tuple[str, list[Chat]]:
    """Where the prompts are from, for people, and the prompts.

    Of `file`, else of the file that JUPITER_BENCH_FILE names, else the project's own. With a
    `limit` they are taken evenly from the whole list, as such files are sorted by subject.

    Raises:
        ConfigError: a file that cannot be read, or a line that is no chat; both are named.
    """
    name = file or os.environ.get(FILE_VARIABLE)
    if name:
        source, chats = Path(name).name, read_chats(Path(name).expanduser())
    else:
        source, chats = "the project's own", [(Message("user", text),) for text in OWN]
    return source, spread(chats, limit)


def read_chats(path: Path) -> list[Chat]:
    """The chats of a JSON lines file, a line each: {"messages": [...]} or {"prompt": "..."}.

    Of `messages` those up to the first question are taken. Raises as `choose_prompts`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    chats = [_chat(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not chats:
        raise ConfigError(f"{path}: holds no prompts")
    return chats


def spread(chats: Sequence[Chat], limit: int | None) -> list[Chat]:
    """`limit` of the chats at even distances, all of them where there are no more."""
    if limit is None or limit >= len(chats):
        return list(chats)
    return [chats[i * len(chats) // limit] for i in range(limit)]


def _chat(line: str, where: str) -> Chat:
    wanted = f'{where}: must be {{"messages": [...]}} with a user\'s, or {{"prompt": "..."}}'
    try:
        values: Any = json.loads(line)
        if isinstance(values.get("prompt"), str):
            return (Message("user", values["prompt"]),)
        messages = msgspec.convert(values["messages"], list[Message])
        asked = next(i for i, message in enumerate(messages) if message.role == "user")
    except (ValueError, AttributeError, KeyError, StopIteration, RecursionError):
        # msgspec's ValidationError is a ValueError
        raise ConfigError(wanted) from None
    return tuple(messages[: asked + 1])
