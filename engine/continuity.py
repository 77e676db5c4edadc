"""An answer that outlives the engine it began on: its tokens are remembered and taken along."""

from __future__ import annotations

import time

from msgspec.structs import replace

from engine.figures import joined
from engine.protocol import Failed, Finished, Generate, Metrics, Started, Tokens
from engine.request import Answer, RequestStream


class AnswerStream(RequestStream):
    """The events of one answer, over any number of engines; as RequestStream for its reader.

    Each engine that works on it plays a part of it.
    """

    def __init__(self, request: Generate) -> None:
        super().__init__(request.request_id)
        self.request = request
        self.cancelled = False
        """The user has stopped it."""
        self.held = False
        """The end of an engine's part is not the answer's end."""
        self._started: Started | None = None
        self._tokens = list(request.answered)
        self._parts: list[Metrics] = []
        self._unshown: list[Tokens] = []
        self._asked = time.monotonic()
        self._first_token_s: float | None = None
        self._counts: list[int] = []
        """Tokens of each step of the present part."""
        self._fresh = not request.answered
        """The present part began with the answer."""
        self._points: dict[int, int] = {}
        """Of an outline answer, how much text of each point was shown."""
        self._again: dict[int, int] = {}
        """How much of it comes once more: another engine writes the same points from the start."""

    @property
    def answered(self) -> tuple[int, ...]:
        """The tokens of the answer so far."""
        return tuple(self._tokens)

    @property
    def ended(self) -> bool:
        """Nothing more will come."""
        return self._ended or self._error is not None

    def continuation(self) -> Generate:
        """The request that makes another engine go on after the last token; ends the hold."""
        self.held = False
        self._unshown.clear()
        self._fresh = not self._tokens
        self._again = dict(self._points)
        known = self._started.transcript if self._started is not None else None
        return replace(
            self.request,
            transcript=known or self.request.transcript,
            transcript_wanted=True,
            answered=self.answered,
            answered_steps=self.request.answered_steps + sum(p.decode_steps for p in self._parts),
        )

    def part(self, event: Answer) -> None:
        """Take in what the present engine says."""
        match event:
            case Started():
                if self._started is None:
                    self._started = event
                    self.put(self._wanted(event))
            case Tokens() if event.point:
                self._put_point(event)
            case Tokens():
                if event.token_ids:
                    self._counts.append(len(event.token_ids))
                    if self._first_token_s is None:
                        self._first_token_s = time.monotonic() - self._asked
                self._tokens += event.token_ids
                if self.held and not event.token_ids:
                    # Held back because it may become a stop string: the next engine sends it.
                    self._unshown.append(event)
                else:
                    self.put(event)
            case Finished() if self.held and event.finish_reason == "cancelled":
                if self.cancelled:
                    self._show_unshown()
                    self._end(event)
                else:
                    self._parts.append(event.metrics)
                    self._counts = []
            case Finished():
                self._end(event)
            case Failed():
                self.put(event)

    def lost(self) -> None:
        """The present engine has gone without an end of its part, and its figures with it."""
        # The first token of an answer comes of its prompt, not of a decode step.
        steps = self._counts[1:] if self._fresh else self._counts
        self._parts.append(
            Metrics(
                ttft_s=self._first_token_s,
                decode_steps=len(steps),
                mean_accepted_len=sum(steps) / len(steps) if steps else None,
            )
        )
        self._counts = []

    def _put_point(self, event: Tokens) -> None:
        point, again = event.point, self._again.get(event.point, 0)
        if self.held and event.point_ended:
            return
        self._again[point] = max(0, again - len(event.text))
        text = event.text[again:]
        if text or event.point_ended:
            self._points[point] = self._points.get(point, 0) + len(text)
            self.put(replace(event, text=text))

    def end_cancelled(self) -> None:
        """End the answer as it is; for one that is held and has no engine."""
        self._show_unshown()
        self._end(
            Finished(
                request_id=self.request_id,
                finish_reason="cancelled",
                context_full=False,
                prompt_tokens=0,
                cached_tokens=0,
                completion_tokens=len(self._tokens),
                metrics=Metrics(),
            )
        )

    def _show_unshown(self) -> None:
        for event in self._unshown:
            self.put(event)
        self._unshown.clear()

    def _end(self, done: Finished) -> None:
        if self._parts and self._started is not None:
            done = replace(
                done,
                prompt_tokens=self._started.prompt_tokens,
                cached_tokens=self._started.cached_tokens,
                metrics=joined([*self._parts, done.metrics]),
            )
        self.put(self._wanted(done))

    def _wanted(self, event: Started | Finished) -> Started | Finished:
        """Without the transcript where only the client has use for it."""
        return event if self.request.transcript_wanted else replace(event, transcript=None)
