"""Outline answers on rank 0: requests of the engine's own, made one answer for the client.

The scheduler knows nothing of outlines: an answer's opening, its outline and its points are
sequences like all others. This part stands between it and the client, hears their events, and
puts what is to come next into the inbox.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from engine.config import JupiterConfig
from engine.pipeline.outline_answer import OutlineAnswer
from engine.pipeline.sequence import Fork
from engine.protocol import Cancel, Event, Failed, Finished, Generate, Started, Tokens
from engine.text import TextCodec


class Outlines:
    """All outline answers that are being given.

    Args:
        codec: the tokenizer.
        config: for limits that a request leaves open.
        put: takes commands for the scheduler.
        emit: takes events for the client.
    """

    def __init__(
        self,
        codec: TextCodec,
        config: JupiterConfig,
        put: Callable[[Any], None],
        emit: Callable[[Event], None],
    ) -> None:
        self._codec, self._config = codec, config
        self._put, self._emit = put, emit
        self._answers: dict[str, OutlineAnswer] = {}
        self._parts: dict[str, OutlineAnswer] = {}
        self._made = 0

    def takes(self, command: object) -> bool:
        """Whether `command` is about an outline answer; it is carried out here then."""
        match command:
            case Fork():
                return False
            case Generate() if command.params.mode == "outline":
                name = command.request_id
                self._answers[name] = OutlineAnswer(
                    command, self._codec, self._config, self._submit, self._cancel, self._emit
                )
                self._answers[name].begin()
                return True
            case Cancel(request_id) if request_id in self._answers:
                self._answers[request_id].cancel()
                return True
        return False

    def emit(self, event: Event) -> None:
        """Pass an event on to the client, or to the answer whose part it is about."""
        if not isinstance(event, Started | Tokens | Finished | Failed):
            self._emit(event)
            return
        answer = self._parts.get(event.request_id)
        if answer is None:
            self._emit(event)
            return
        if isinstance(event, Finished | Failed):
            del self._parts[event.request_id]
        answer.hear(event)
        if answer.ended:
            del self._answers[answer.request_id]

    def _submit(self, answer: OutlineAnswer, fork: Fork) -> str:
        """Have a part of an answer written; returns its request's id."""
        self._made += 1
        name = f"{answer.request_id}/{self._made}"
        self._parts[name] = answer
        self._put(replace(fork, request_id=name))
        return name

    def _cancel(self, name: str) -> None:
        self._put(Cancel(name))
