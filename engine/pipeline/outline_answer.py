"""One outline answer: what it is made of, and what comes next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from engine.config import JupiterConfig
from engine.decoding.outline import (
    MAX_POINTS,
    MIN_POINTS,
    POINT_END,
    ListStart,
    Next,
    Outline,
    asked_for,
    find_list,
    settled,
    share_tokens,
)
from engine.figures import joined
from engine.pipeline.outline_part import Kind, Part, gone_on
from engine.pipeline.sequence import Fork
from engine.protocol import (
    Event,
    Failed,
    Finished,
    FinishReason,
    Generate,
    Metrics,
    SamplingParams,
    Started,
    Tokens,
    Transcript,
)
from engine.text import TextCodec

POINT_TOKENS = 160
"""Most tokens of one point: one that never ends holds up all the others."""
POINT_ROOM = 32
"""Fewer tokens than these for each point are too few to begin one."""
LINE_TOKENS = 40
"""Most tokens that the outline may take at a time."""
SURPRISE = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=LINE_TOKENS)
"""How a title is drawn where the likeliest was there already."""
NOTHING = Transcript()

Answer = Started | Tokens | Finished | Failed
Submit = Callable[["OutlineAnswer", Fork], str]


class OutlineAnswer:
    """The state of one outline answer.

    It begins as a plain answer, its opening. If that becomes a list, the opening is cut off there,
    the outline is written in lines, and each point is a fork of what came before the list. A list
    without two different points goes on plainly, as does an answer that is none.

    Args:
        request: the client's.
        codec: the tokenizer.
        config: for limits that the request leaves open.
        submit: has a part written, under the id that it returns.
        cancel: ends a part, by its id.
        emit: takes events for the client.
    """

    def __init__(
        self,
        request: Generate,
        codec: TextCodec,
        config: JupiterConfig,
        submit: Submit,
        cancel: Callable[[str], None],
        emit: Callable[[Event], None],
    ) -> None:
        self.request, self.codec = request, codec
        self.request_id = request.request_id
        self.ended = False
        self._submit, self._cancel, self._emit = submit, cancel, emit
        self._limit = request.params.max_tokens or config.max_new_tokens
        self._live: dict[str, Part] = {}
        self._cancelled = False
        self._list: ListStart | None = None
        self._outline: Outline | None = None
        self._next = Next.WAIT
        self._base = NOTHING
        """Prompt and opening: what the points share; in the end all of a plain answer."""
        self._points: dict[int, Transcript] = {}
        """What each point has, itself behind the base."""
        self._share = POINT_TOKENS
        self._tried_again: set[int] = set()
        self._started: Started | None = None
        self._failed: Failed | None = None
        self._ends: list[Finished] = []
        """How the sequences ended that the answer's end depends on."""
        self._metrics: list[Metrics] = []
        self._count = len(request.answered)
        self._first_count = 0
        self._began = self._first_at = self._last_at = time.perf_counter()

    # --- commands --------------------------------------------------------------------------

    def begin(self) -> None:
        """Have the opening written."""
        values = {name: getattr(self.request, name) for name in Generate.__struct_fields__}
        values |= {"transcript_wanted": True, "trace": False, "params": self._params()}
        self._add(Part(Kind.OPENING, 0, NOTHING, self.codec), Fork(**values))

    def cancel(self) -> None:
        """Stop all parts; what they have written stands."""
        self._cancelled = True
        for name in self._live:
            self._cancel(name)

    def _params(self, **changes: object) -> SamplingParams:
        return replace(self.request.params, mode="plain", **changes)

    def _add(self, part: Part, fork: Fork) -> None:
        self._live[self._submit(self, fork)] = part

    def _write(
        self, kind: Kind, before: Transcript, params: SamplingParams, point: int = 0
    ) -> None:
        """Have what comes behind `before` written."""
        fork = Fork(
            request_id="", prompt=before.text, transcript=before, params=params, point=point
        )
        self._add(Part(kind, point, before, self.codec), fork)

    # --- events ----------------------------------------------------------------------------

    def hear(self, event: Answer) -> None:
        """Take in what happened to a part."""
        part = self._live[event.request_id]
        match event:
            case Started() if part.kind is Kind.OPENING:
                self._started = event
                part.begin(known := event.transcript or NOTHING, self.request.answered)
                transcript = known if self.request.transcript_wanted else None
                self._emit(replace(event, request_id=self.request_id, transcript=transcript))
            case Tokens() if not part.cut:
                part.add(event)
                self._grew(event.request_id, part)
            case Finished() | Failed():
                del self._live[event.request_id]
                if isinstance(event, Finished):
                    self._metrics.append(event.metrics)
                self._part_ended(part, event)
                if not self._live:
                    self._end()

    def _grew(self, name: str, part: Part) -> None:
        match part.kind:
            case Kind.OPENING:
                self._look_for_list(part)
            case Kind.LINES:
                self._next = self._read(part, ended=False)
                part.cut = self._next is not Next.WAIT
            case _:
                self._show(part, len(part.text))
        if part.cut:
            self._cancel(name)

    def _part_ended(self, part: Part, event: Finished | Failed) -> None:
        if part.kind is Kind.LINES:
            if not self._cancelled:
                self._after_lines(part)
            return
        if part.kind is Kind.OPENING and self._list is not None:
            self._base = part.up_to(self._list.at)
            if not self._cancelled:
                self._begin_outline(part)
            return
        if part.kind is Kind.POINT and self._is_empty(part, event):
            self._tried_again.add(part.point)
            self._write_point(part.point)
            return
        self._show(part, len(part.text))
        if isinstance(event, Finished):
            self._ends.append(event)
        elif part.kind is Kind.OPENING:
            self._failed = event
        if part.kind is Kind.POINT:
            self._points[part.point] = part.up_to(len(part.text))
            if not self._cancelled:
                self._tell_ended(part.point)
        else:
            self._base = part.up_to(len(part.text))

    # --- the outline -----------------------------------------------------------------------

    def _look_for_list(self, part: Part) -> None:
        found = find_list(part.text)
        if found is None or self._room(part, found) < MIN_POINTS:
            self._show(part, settled(part.text) if found is None else len(part.text))
            return
        self._list, part.cut = found, True
        self._show(part, found.at)

    def _room(self, part: Part, found: ListStart) -> int:
        """How many points the answer's limit has room for behind the opening."""
        if self._limit is None:
            return MAX_POINTS
        return (self._limit - part.tokens_of(found.at)) // POINT_ROOM

    def _begin_outline(self, opening: Part) -> None:
        assert self._list is not None
        messages = self.request.messages
        asked = asked_for(messages[-1].content if messages else self.request.prompt or "")
        room = self._room(opening, self._list)
        most = min(asked or MAX_POINTS, MAX_POINTS, room)
        self._outline = Outline(self._list.style, most=most, least=min(asked or MIN_POINTS, most))
        self._write_lines(self._outline)

    def _write_lines(self, outline: Outline) -> None:
        params = self._params(max_tokens=LINE_TOKENS, stop=())
        if outline.sample:
            seed = (self.request.params.seed or 0) + len(outline.titles)
            params = replace(SURPRISE, seed=seed)
        self._write(Kind.LINES, gone_on(self._base, outline.prompt, self.codec), params)

    def _read(self, part: Part, *, ended: bool) -> Next:
        """Read on in the outline, and show each point that is new, once there are two."""
        outline = self._outline
        assert outline is not None
        after = outline.read(part.text, ended=ended)
        if len(outline.titles) > 1:
            for point in range(len(self._points) + 1, len(outline.titles) + 1):
                header = outline.header(point)
                start = self._points[point] = gone_on(self._base, header, self.codec)
                between = "" if point == 1 else POINT_END
                tokens = [*self._between(point), *start.token_ids[len(self._base.token_ids) :]]
                self._send(point, tokens, between + header)
        return after

    def _between(self, point: int) -> list[int]:
        """Tokens that part a point from the one before it."""
        return [] if point == 1 else self.codec.encode(POINT_END, add_special_tokens=False)

    def _after_lines(self, part: Part) -> None:
        outline = self._outline
        assert outline is not None
        after = self._next if part.cut else self._read(part, ended=True)
        if after is Next.AGAIN:
            self._write_lines(outline)
        elif len(outline.titles) > 1:
            self._expand()
        else:  # go on where the list began, as if nothing had been tried
            limit = None if self._limit is None else self._limit - self._count
            self._write(Kind.PLAIN, self._base, self._params(max_tokens=limit))

    def _expand(self) -> None:
        """Fork the points."""
        if self._limit is not None:
            left = self._limit - self._count
            self._share = share_tokens(left, len(self._points), POINT_TOKENS)
        for point in self._points:
            self._write_point(point)

    def _write_point(self, point: int) -> None:
        assert self._outline is not None
        stop = (*self._outline.style.stops(point), *self.request.params.stop)
        params = self._params(max_tokens=self._share, stop=stop)
        if (seed := self.request.params.seed) is not None:
            params = replace(params, seed=seed + point)
        if point in self._tried_again:
            params = replace(params, temperature=SURPRISE.temperature, top_p=SURPRISE.top_p)
        self._write(Kind.POINT, self._points[point], params, point)

    def _is_empty(self, part: Part, event: Finished | Failed) -> bool:
        """Whether a point has nothing to say; it is written once more then, less predictably."""
        stopped = isinstance(event, Finished) and event.finish_reason == "stop"
        return stopped and not part.text.strip() and part.point not in self._tried_again

    # --- to the client ---------------------------------------------------------------------

    def _show(self, part: Part, length: int) -> None:
        self._send(part.point, *part.unsent(length))

    def _send(self, point: int, tokens: Iterable[int], text: str) -> None:
        ids = tuple(tokens)
        if not (ids or text):
            return
        self._last_at = time.perf_counter()
        self._count += len(ids)
        if not self._first_count:
            self._first_at, self._first_count = self._last_at, len(ids)
        self._emit(Tokens(request_id=self.request_id, token_ids=ids, text=text, point=point))

    def _tell_ended(self, point: int) -> None:
        name = self.request_id
        self._emit(Tokens(request_id=name, token_ids=(), text="", point=point, point_ended=True))

    def _end(self) -> None:
        self.ended = True
        if self._failed is not None:
            self._emit(replace(self._failed, request_id=self.request_id))
            return
        started = self._started
        self._emit(
            Finished(
                request_id=self.request_id,
                finish_reason=self._finish_reason(),
                context_full=any(end.context_full for end in self._ends),
                prompt_tokens=started.prompt_tokens if started else 0,
                cached_tokens=started.cached_tokens if started else 0,
                completion_tokens=self._count,
                metrics=self._figures(),
                transcript=self._transcript() if self.request.transcript_wanted else None,
            )
        )

    def _finish_reason(self) -> FinishReason:
        if self._cancelled:
            return "cancelled"
        return "length" if any(end.finish_reason == "length" for end in self._ends) else "stop"

    def _figures(self) -> Metrics:
        """Of all sequences together; the rate is that of the whole answer.

        Its first token is the first that was shown: the opening waits until it is known what it is.
        """
        seconds = self._last_at - self._first_at
        later = self._count - self._first_count - len(self.request.answered)
        rate = later / seconds if seconds > 0 else None
        first = self._first_at - self._began if self._first_count else None
        return replace(joined(self._metrics), ttft_s=first, tokens_per_s=rate)

    def _transcript(self) -> Transcript:
        """Prompt and whole answer, in the order in which it is read."""
        text, tokens = self._base.text, list(self._base.token_ids)
        for point, own in sorted(self._points.items()):
            text += ("" if point == 1 else POINT_END) + own.text[len(self._base.text) :]
            tokens += [*self._between(point), *own.token_ids[len(self._base.token_ids) :]]
        return Transcript(text, tuple(tokens))
