"""Rank 0's loop: the only place that decides what enters the pipeline next.

Chat, batch and plain decoding are all the same here: sequences that are prefilled in chunks and
then take decode steps, put together into micro-batches.
"""

from __future__ import annotations

import math
import queue
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from engine.config import JupiterConfig
from engine.decoding.accept import GREEDY, NUCLEUS, RULES, AcceptRule
from engine.decoding.tree import Tree
from engine.errors import PromptError, StageLostError
from engine.pipeline.batch import Entry, Judge, Result, decode_results, encode_batch
from engine.pipeline.link import Kind, Link
from engine.pipeline.sequence import Limits, Sequence
from engine.pipeline.slots import SlotTable
from engine.pipeline.stage import Stage
from engine.protocol import (
    Cancel,
    Event,
    Failed,
    Finished,
    Generate,
    Metrics,
    SamplingParams,
    Shutdown,
    Started,
    Tokens,
)
from engine.text import TextCodec, TextStream

# Below this a chunk costs as much as a longer one: the weights are read once either way.
MIN_CHUNK = 32
# A stage may have a long chunk to finish before it sees the stop; nobody waits longer for it.
STOP_S = 3.0


@dataclass
class Arrived:
    """A message from the last stage, put into the inbox by the receiving thread."""

    kind: Kind
    numbers: list[int]


@dataclass
class LinkDown:
    """The receiving thread's last words."""

    error: str


@dataclass
class _Flight:
    entries: list[Entry]
    sequences: list[Sequence]


class Scheduler:
    """Runs requests over the stages; call `run` on rank 0's main thread.

    Commands and results come through `inbox`; events leave through `emit`.
    """

    def __init__(
        self,
        stage: Stage,
        link: Link | None,
        codec: TextCodec,
        config: JupiterConfig,
        tree: Tree,
        *,
        context_length: int,
        inbox: queue.SimpleQueue[Any],
        emit: Callable[[Event], None],
        tick_s: float,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.stage, self.link, self.codec, self.config, self.tree = stage, link, codec, config, tree
        self.context_length = context_length
        self.inbox, self.emit, self.tick_s, self.on_step = inbox, emit, tick_s, on_step
        self.slots = SlotTable(config.max_num_seqs)
        self.waiting: deque[tuple[Generate, float]] = deque()
        self.running: list[Sequence] = []
        self.flights: deque[_Flight] = deque()
        # One micro-batch for each stage, and one on its way.
        self.max_flights = config.world_size + 1 if link else 1
        self.tick_out = False
        self.prefill_next = True
        self.stopping = False

    def run(self) -> None:
        """Serve until a Shutdown command; stops the other stages too.

        Raises StageLostError when a neighbour is lost.
        """
        while not self.stopping:
            self._admit()
            flight = self._next_flight() if len(self.flights) < self.max_flights else None
            if flight is not None:
                self._dispatch(flight)
            self._handle_inbox(wait=flight is None)
            self.on_step()
        if self.link:
            self.link.send(1, Kind.STOP)
            self._await_stop()

    def _await_stop(self) -> None:
        """Wait until the stop has gone round: a stage that still waits must not lose its peer."""
        deadline = time.monotonic() + STOP_S
        with suppress(queue.Empty):
            while (left := deadline - time.monotonic()) > 0:
                match self.inbox.get(timeout=left):
                    case Arrived(Kind.STOP) | LinkDown():
                        return

    # --- what comes in ---------------------------------------------------------------------

    def _handle_inbox(self, *, wait: bool) -> None:
        if wait:
            self._wait()
        with suppress(queue.Empty):
            while True:
                self._handle(self.inbox.get_nowait())

    def _wait(self) -> None:
        """Wait for the next message; send a tick round when none comes for a while."""
        began = time.perf_counter()
        try:
            item = self.inbox.get(timeout=self.tick_s)
        except queue.Empty:
            if self.link and not self.flights and not self.tick_out:
                self.link.send(1, Kind.TICK)
                self.tick_out = True
            return
        if self.flights:
            self.stage.wait_s += time.perf_counter() - began
        self._handle(item)

    def _handle(self, item: Any) -> None:
        match item:
            case Arrived(Kind.RESULTS, numbers):
                self._land(self.flights.popleft(), decode_results(numbers))
            case Arrived(Kind.TICK):
                self.tick_out = False
            case LinkDown(error):
                raise StageLostError(f"rank 0 lost a neighbour: {error}")
            case Generate():
                self.waiting.append((item, time.perf_counter()))
            case Cancel(request_id):
                self._cancel(request_id)
            case Shutdown():
                self.stopping = True

    def _cancel(self, request_id: str) -> None:
        for sequence in self.running:
            if sequence.request_id == request_id:
                sequence.finish_reason = "cancelled"
                self._show(sequence, [], sequence.stream.flush())
                self._finish(sequence)
                return
        for waiting in self.waiting:
            if waiting[0].request_id == request_id:
                self.waiting.remove(waiting)
                self.emit(_never_started(request_id))
                return

    # --- admission -------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting and self.slots.any_free():
            request, arrived = self.waiting.popleft()
            try:
                sequence = self._start(request, arrived)
            except PromptError as error:
                code = error.code
                self.emit(Failed(request_id=request.request_id, message=str(error), code=code))
                continue
            self.running.append(sequence)
            self.emit(
                Started(
                    request_id=sequence.request_id,
                    prompt_tokens=sequence.prompt_tokens,
                    cached_tokens=sequence.cached_tokens,
                )
            )

    def _start(self, request: Generate, arrived: float) -> Sequence:
        params, codec = request.params, self.codec
        rule = accept_rule(params, self.config)
        chat = request.messages is not None
        text = codec.render(request.messages) if request.messages else request.prompt or ""
        place = self.slots.acquire(text, codec, chat=chat, limit=self.context_length)
        slot, tokens, cached = place.slot, place.tokens, place.cached
        return Sequence(
            request_id=request.request_id,
            tokens=list(tokens),
            prompt_tokens=len(tokens),
            cached_tokens=cached,
            slot=slot,
            prompt_text=text,
            rule=rule,
            limits=Limits(
                params.max_tokens or self.config.max_new_tokens,
                self.config.max_steps,
                self.context_length,
            ),
            stream=TextStream(codec, tokens, params.stop),
            arrived=arrived,
            stop_ids=codec.stop_ids,
            fed=cached,
            chunk=self._chunk(len(tokens) - cached),
            keep=slot.keep,
            keep_to=slot.keep_to,
        )

    def _chunk(self, new_tokens: int) -> int:
        """Rows per prefill chunk: enough chunks to fill the stages, none of them tiny."""
        longest = self.config.max_sub_sequence_len
        if self.link is None:
            return longest
        return min(longest, max(MIN_CHUNK, math.ceil(new_tokens / self.config.num_sub_sequences)))

    # --- what goes out ---------------------------------------------------------------------

    def _next_flight(self) -> _Flight | None:
        """Prefill chunks and decode steps take turns where both wait."""
        prefill = [s for s in self.running if s.fed < s.prompt_tokens]
        decode = [s for s in self.running if s.ready_to_decode]
        if prefill and (self.prefill_next or not decode):
            self.prefill_next = False
            return self._prefill(prefill)
        self.prefill_next = True
        if decode:
            return _Flight([self._decode_entry(s) for s in decode], decode)
        return None

    def _prefill(self, sequences: list[Sequence]) -> _Flight:
        flight = _Flight([], [])
        room = self.config.max_sub_sequence_len
        for sequence in sequences:
            n = min(sequence.chunk, sequence.prompt_tokens - sequence.fed, room)
            if n == 0:
                break
            start = sequence.fed
            last = start + n == sequence.prompt_tokens
            entry = self._entry(sequence, sequence.tokens[start : start + n], range(-1, n - 1))
            entry.judge = Judge.LAST if last else Judge.NONE
            sequence.fed += n
            room -= n
            flight.entries.append(entry)
            flight.sequences.append(sequence)
        return flight

    def _decode_entry(self, sequence: Sequence) -> Entry:
        tree = self.tree
        tokens = tree.tokens(sequence.tokens[-1], sequence.candidates)
        entry = self._entry(sequence, tokens, tree.parents)
        entry.judge = Judge.TREE
        sequence.in_flight = True
        return entry

    def _entry(self, sequence: Sequence, tokens: list[int], parents: Any) -> Entry:
        entry = Entry(
            slot=sequence.slot.index,
            start=sequence.fed,
            tokens=tokens,
            parents=list(parents),
            judge=Judge.NONE,
            keep=sequence.keep,
            keep_to=sequence.keep_to,
            draft_width=self.tree.width if self.tree.depth else 0,
            rule=sequence.rule,
        )
        sequence.keep = []
        return entry

    def _dispatch(self, flight: _Flight) -> None:
        hidden = self.stage.run(flight.entries, None)
        if self.link is None:
            self._land(flight, self.stage.judge(flight.entries, hidden))
            return
        self.flights.append(flight)
        self.link.send(1, Kind.BATCH, encode_batch(flight.entries), hidden)

    # --- what comes back -------------------------------------------------------------------

    def _land(self, flight: _Flight, results: list[Result]) -> None:
        judged = [
            (entry, sequence)
            for entry, sequence in zip(flight.entries, flight.sequences, strict=True)
            if entry.judge is not Judge.NONE
        ]
        for (entry, sequence), result in zip(judged, results, strict=True):
            sequence.in_flight = False
            if sequence.finish_reason is None:
                self._advance(sequence, entry, result)

    def _advance(self, sequence: Sequence, entry: Entry, result: Result) -> None:
        tokens = [entry.tokens[node] for node in result.path[1:]] + [result.next_token]
        sequence.candidates = result.candidates
        if entry.judge is Judge.TREE:
            start, length = entry.start, len(result.path)
            sequence.count_step(self.tree, length)
            sequence.fed = start + length
            # Rows that lie where they belong already need no move.
            moved = next((i for i, node in enumerate(result.path) if node != i), length)
            sequence.keep = [start + node for node in result.path[moved:]]
            sequence.keep_to = start + moved
        taken, text = sequence.take(tokens)
        if entry.judge is Judge.TREE:
            sequence.decode_tokens += len(taken)
        self._show(sequence, taken, text)
        if sequence.finish_reason is not None:
            self._finish(sequence)

    def _show(self, sequence: Sequence, tokens: list[int], text: str) -> None:
        if tokens or text:
            self.emit(Tokens(request_id=sequence.request_id, token_ids=tuple(tokens), text=text))

    def _finish(self, sequence: Sequence) -> None:
        sequence.release()
        self.running.remove(sequence)
        self.emit(sequence.finished())


def accept_rule(params: SamplingParams, config: JupiterConfig) -> AcceptRule:
    """How a request's tokens are chosen: its own parameters before the config's.

    A request that names top_p asks for nucleus sampling, whatever the config's rule is.
    Raises PromptError for a value out of range.
    """
    temperature = config.temperature if params.temperature is None else params.temperature
    top_p = config.top_p if params.top_p is None else params.top_p
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise PromptError(f"temperature {temperature}: must be 0 or more")
    if not 0 < top_p <= 1:
        raise PromptError(f"top_p {top_p}: must be above 0 and at most 1")
    if params.max_tokens is not None and params.max_tokens < 1:
        raise PromptError(f"max_tokens {params.max_tokens}: must be 1 or more")
    seed = secrets.randbits(62) if params.seed is None else params.seed
    rule = RULES[config.sampling]
    if temperature == 0:
        rule = GREEDY
    elif params.top_p is not None:
        rule = NUCLEUS
    return AcceptRule(
        rule=rule,
        temperature=temperature,
        top_p=top_p,
        posterior_threshold=config.posterior_threshold,
        posterior_alpha=config.posterior_alpha,
        seed=(seed + 2**63) % 2**64 - 2**63,
    )


def _never_started(request_id: str) -> Finished:
    return Finished(
        request_id=request_id,
        finish_reason="cancelled",
        context_full=False,
        prompt_tokens=0,
        cached_tokens=0,
        completion_tokens=0,
        metrics=Metrics(),
    )
