"""The messages between the parts of the screen.

Whoever learns something posts one of these; one handler owns the change of state that follows:
the app for the engine's snapshot, the chat screen for the conversation.
"""

from __future__ import annotations

from collections.abc import Sequence

from textual.message import Message

from engine.protocol import Failed, Finished, Started, Tokens
from tui.conversation import Node
from tui.snapshot import Snapshot


class EngineChanged(Message):
    """The engine's state as it is now. To the app."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        super().__init__()

    def can_replace(self, message: Message) -> bool:
        """A snapshot still in the queue gives way to a newer one."""
        return isinstance(message, EngineChanged)


class EngineNotice(Message):
    """Something from a stage that a person should know. To the app."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__()


class PromptSubmitted(Message):
    """The user sent a prompt, maybe in the place of an earlier one. To the chat screen."""

    def __init__(self, text: str, instead_of: Node | None = None) -> None:
        self.text = text
        self.instead_of = instead_of
        super().__init__()


class AnswerMessage(Message):
    """About the request `request_id`. To the chat screen."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        super().__init__()


class AnswerStarted(AnswerMessage):
    """The engine took the request in."""

    def __init__(self, started: Started) -> None:
        self.started = started
        super().__init__(started.request_id)


class AnswerGrew(AnswerMessage):
    """`events` came, with `token_ids` together; the last arrived at `at` (seconds).

    `steps` tell how the tokens came, if the request asked for that.
    """

    def __init__(
        self,
        request_id: str,
        events: Sequence[Tokens],
        at: float,
    ) -> None:
        self.events = events
        self.text = "".join(event.text for event in events)
        self.token_ids = [token for event in events for token in event.token_ids]
        self.at = at
        self.steps = [step for event in events for step in event.trace]
        super().__init__(request_id)


class AnswerFinished(AnswerMessage):
    """The answer is complete, or was cut off for the reason that `finished` tells."""

    def __init__(self, finished: Finished) -> None:
        self.finished = finished
        super().__init__(finished.request_id)


class AnswerFailed(AnswerMessage):
    """The engine refused the request and goes on."""

    def __init__(self, failed: Failed) -> None:
        self.failed = failed
        super().__init__(failed.request_id)


class AnswerLost(AnswerMessage):
    """The engine died under the request; the snapshot tells why."""
