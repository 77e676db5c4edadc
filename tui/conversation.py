"""A conversation as data: what was asked, what was answered, and how each answer ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from engine.protocol import Message


class Ending(Enum):
    """How an answer ended; the value is the quiet marker under it ("" for none)."""

    STOP = ""
    CANCELLED = "stopped"
    LENGTH = "cut off at the length limit"
    CONTEXT_FULL = "cut off: the context is full · Ctrl+N starts a new conversation"
    ENGINE_LOST = "cut off: the engine stopped"
    REFUSED = "not finished"


@dataclass(eq=False)
class Exchange:
    """One prompt and its answer. `answer` is the model's text as it came, controls and all."""

    prompt: str
    answer: str = ""
    ending: Ending | None = None
    """None while the answer is waited for or running."""


@dataclass
class Conversation:
    """The exchanges in their order."""

    exchanges: list[Exchange] = field(default_factory=list)

    def messages_for(self, exchange: Exchange) -> tuple[Message, ...]:
        """The whole conversation up to `exchange`, whose prompt comes last.

        An earlier prompt that got no answer (refused, or stopped before its first token) is left
        out: a prompt that was too long would otherwise spoil every later turn.
        """
        messages: list[Message] = []
        for earlier in self.exchanges[: self.exchanges.index(exchange)]:
            if earlier.answer.strip():
                messages.append(Message("user", earlier.prompt))
                messages.append(Message("assistant", earlier.answer))
        return (*messages, Message("user", exchange.prompt))
