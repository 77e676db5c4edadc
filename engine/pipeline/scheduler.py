"""Rank 0's loop: the only place that decides what enters the pipeline next.

Chat, batch and plain decoding are all the same here: sequences that are prefilled in chunks and
then take decode steps, put together into micro-batches.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from engine.config import JupiterConfig
from engine.decoding.drafted import Drafted
from engine.decoding.tuner import Drafting
from engine.errors import PromptError, StageLostError
from engine.pipeline.batch import Copy, Entry, Judge, Result, decode_results, encode_batch
from engine.pipeline.flights import Composer, Flight
from engine.pipeline.link import Kind, Link
from engine.pipeline.outlines import Outlines
from engine.pipeline.resplit import encode_split
from engine.pipeline.rule import accept_rule
from engine.pipeline.sequence import Fork, Limits, Sequence, never_started
from engine.pipeline.slots import SlotTable
from engine.pipeline.stage import Stage
from engine.pipeline.tracing import step_trace
from engine.pipeline.waiting import WaitingRequests
from engine.planning.chunks import planned_chunks, prefill_chunks
from engine.planning.profiler import Profiler
from engine.protocol import (
    Cancel,
    Event,
    Failed,
    Generate,
    Measure,
    Profiled,
    Regroup,
    Resplit,
    Shutdown,
    StepTrace,
    Tokens,
)
from engine.text import TextCodec, TextStream

# A stage may have a long chunk to finish before it sees the stop; nobody waits longer for it.
STOP_S = 3.0
# Seconds without work after which the other stages are told that there is none.
REST_S = 0.05


@dataclass
class Arrived:
    """A message from the last stage, put into the inbox by the receiving thread."""

    link: Link
    kind: Kind
    numbers: list[int]


@dataclass
class LinkDown:
    """The receiving thread's last words."""

    link: Link
    error: str


def _order(item: Any) -> list[int] | None:
    """The numbers of an order to measure that has come back."""
    return item.numbers if isinstance(item, Arrived) and item.kind is Kind.MEASURE else None


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
        drafting: Drafting,
        *,
        context_length: int,
        kv_rows: int | None = None,
        inbox: queue.SimpleQueue[Any],
        emit: Callable[[Event], None],
        tick_s: float,
        resplit: Callable[[list[int]], None] = lambda numbers: None,
        on_resplit: Callable[[], None] = lambda: None,
    ) -> None:
        """`resplit` shares out this stage's layers anew; `on_resplit` is called when all have."""
        self.stage, self.link, self.codec, self.config = stage, link, codec, config
        self.drafting = drafting
        self.context_length = context_length
        self.inbox, self.tick_s = inbox, tick_s
        self._emit = emit
        self._unsent: list[Event] = []
        self.outlines = Outlines(codec, config, inbox.put, self._unsent.append)
        self.emit = self.outlines.emit
        budget = config.max_batch_total_tokens or kv_rows
        if budget is not None:
            self.context_length = min(context_length, budget)
        self.slots = SlotTable(config.max_num_seqs, budget)
        self.waiting = WaitingRequests()
        self.full = False
        """The next request waits for memory, until another one ends."""
        self.running: list[Sequence] = []
        self.flights: deque[Flight] = deque()
        self.copies: list[Copy] = []
        """Forks that go out with the next micro-batch, before anything can write over a source."""
        self.composer = Composer(
            drafting,
            stages=config.world_size if link else 1,
            shared=stage.neighbours > 1,
            longest=config.max_sub_sequence_len,
        )
        self.tick_out = False
        self.resting = True
        self.measuring = False
        self.stopping = False
        self._share_out, self._on_resplit = resplit, on_resplit
        self._new_split: tuple[int, ...] | None = None
        """Waits until nothing is under way, and then for the other stages."""
        self._sharing = False

    def run(self) -> None:
        """Serve until a Shutdown command; stops the other stages too.

        Raises StageLostError when a neighbour is lost.
        """
        try:
            self._serve()
        finally:
            self._tell()
        if self.link:
            self.link.send(1, Kind.STOP)
            self._await_stop()

    def _serve(self) -> None:
        while not self.stopping:
            self._admit()
            flight = None
            if self._new_split is None:
                if self.measuring and not (self.running or self.flights or self.tick_out):
                    self._measure()
                flight = self.composer.next(self.running, self.flights)
            elif not (self.flights or self.tick_out or self._sharing):
                self._resplit(self._new_split)
            if flight is not None:
                self._dispatch(flight)
            self._tell()
            self._handle_inbox(wait=flight is None)

    def _tell(self) -> None:
        """Emit what has happened: behind a dispatch, so that the next stage is at work meanwhile,
        and the client's reading takes no core from this one's layers."""
        for event in self._unsent:
            self._emit(event)
        self._unsent.clear()
        self.stage.settle()

    def _measure(self) -> None:
        """Measure stages and links while there is nothing else to do; slots lose their rows."""
        self.measuring = False
        self.slots = SlotTable(self.config.max_num_seqs)
        profiler = Profiler(self.stage, self.link, 0, self.config.world_size)
        self.emit(Profiled(profiler.run(self.inbox, _order, self._handle)))

    def _await_stop(self) -> None:
        """Wait until the stop has gone round: a stage that still waits must not lose its peer."""
        deadline = time.monotonic() + STOP_S
        with suppress(queue.Empty):
            while (left := deadline - time.monotonic()) > 0:
                match self.inbox.get(timeout=left):
                    case Arrived(kind=Kind.STOP) | LinkDown():
                        return

    # --- what comes in ---------------------------------------------------------------------

    def _handle_inbox(self, *, wait: bool) -> None:
        if wait:
            self._wait()
        with suppress(queue.Empty):
            while True:
                self._handle(self.inbox.get_nowait())

    def _wait(self) -> None:
        """Wait for the next message; send a tick round when none comes for a while.

        The first tick after some work comes soon: from it the stages know that they are idle.
        """
        timeout = self.tick_s if self.flights or self.resting else min(REST_S, self.tick_s)
        try:
            with self.stage.meter.during("wait" if self.flights else "idle"):
                item = self.inbox.get(timeout=timeout)
        except queue.Empty:
            if not self.flights and not self.tick_out:
                self.resting = True
                if self.link:
                    self.link.send(1, Kind.TICK)
                    self.tick_out = True
            return
        self._handle(item)

    def _handle(self, item: Any) -> None:
        match item:
            case Arrived(link=link) | LinkDown(link=link) if link is not self.link:
                pass  # of a process group that this rank has left
            case Arrived(kind=Kind.RESULTS, numbers=numbers):
                self._land(self.flights.popleft(), decode_results(numbers))
            case Arrived(kind=Kind.TICK):
                self.tick_out = False
            case Arrived(kind=Kind.RESPLIT):
                self._new_split, self._sharing = None, False
                self._on_resplit()
            case Resplit(split=split):
                self._new_split = split
            case LinkDown(error=error):
                raise StageLostError(f"rank 0 lost a neighbour: {error}")
            case Generate() | Cancel() if self.outlines.takes(item):
                pass
            case Generate():
                self.waiting.put(item)
            case Cancel(request_id):
                self._cancel(request_id)
            case Measure():
                self.measuring = True
            case Shutdown():
                self.stopping = True
            case Regroup():
                self.inbox.put(item)  # whoever takes over from here needs it
                raise StageLostError("another stage was lost")

    def _cancel(self, request_id: str) -> None:
        for sequence in self.running:
            if sequence.request_id == request_id:
                sequence.finish_reason = "cancelled"
                self._end(sequence)
                return
        if self.waiting.remove(request_id):
            self.emit(never_started(request_id))

    def _resplit(self, split: tuple[int, ...]) -> None:
        """Have all stages share out the layers anew; the KV rows that matter go along."""
        if self.link is None:
            self._new_split = None
            self._on_resplit()
            return
        busy = {s.slot.index: (s.fed, s.keep) for s in self.running}
        slots = []
        for slot in self.slots.slots:
            fed, keep = busy.get(slot.index, (slot.rows, slot.keep))
            rows = min(max([fed, *(row + 1 for row in keep)]), self.stage.store.capacity)
            if rows:
                slots.append((slot.index, rows))
        self._sharing = True
        numbers = encode_split(split, slots)
        self.link.send(1, Kind.RESPLIT, numbers)
        self._share_out(numbers)

    # --- admission -------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting and not self.full and self.slots.any_free():
            request, arrived = self.waiting.pop()
            try:
                with self.stage.meter.at_text():
                    sequence = self._start(request, arrived)
            except PromptError as error:
                code = error.code
                self.emit(Failed(request_id=request.request_id, message=str(error), code=code))
                continue
            if sequence is None:
                # Others wait behind it, or it would never have its turn.
                self.waiting.put_back(request, arrived)
                self.full = True
                return
            self.running.append(sequence)
            self.emit(sequence.started())
            if sequence.finish_reason is not None:
                self._end(sequence)

    def _start(self, request: Generate, arrived: float) -> Sequence | None:
        """The request with a place of its own; None where there is no room for it yet."""
        params, codec = request.params, self.codec
        rule = accept_rule(params, self.config)
        max_tokens = params.max_tokens or self.config.max_new_tokens
        chat = request.messages is not None
        text = codec.render(request.messages) if request.messages else request.prompt or ""
        self._check_answered(request.answered)
        place = self.slots.acquire(
            text,
            codec,
            chat=chat,
            limit=self.context_length,
            transcript=request.transcript,
            answered=request.answered,
            fork=isinstance(request, Fork),
            max_tokens=max_tokens,
        )
        if place is None:
            return None
        slot, tokens, cached = place.slot, place.tokens, place.cached
        self.copies += place.copies
        new = len(tokens) + len(request.answered) - cached
        sequence = Sequence(
            request_id=request.request_id,
            tokens=list(tokens),
            prompt_tokens=len(tokens),
            begun=len(tokens),
            cached_tokens=min(cached, len(tokens)),
            slot=slot,
            prompt_text=text,
            rule=rule,
            limits=Limits(
                max_tokens,
                self.config.max_steps,
                self.context_length,
            ),
            stream=TextStream(codec, tokens, params.stop),
            arrived=arrived,
            stop_ids=codec.stop_ids,
            fed=cached,
            chunks=self._chunks(new),
            keep=place.keep,
            keep_to=place.keep_to,
            trace=request.trace,
            transcript_wanted=request.transcript_wanted,
            point=request.point if isinstance(request, Fork) else 0,
        )
        if request.answered:
            # The row behind the last of them gives the next token, as a decode step would have.
            sequence.steps_before = request.answered_steps + 1
            sequence.recall(request.answered)
        return sequence

    def _check_answered(self, tokens: Iterable[int]) -> None:
        size = self.stage.model.config.vocab_size
        for token in tokens:
            if not 0 <= token < size:
                raise PromptError(f"answered: token {token} is none of this model's {size}")

    def _chunks(self, rows: int) -> list[int]:
        """Rows of each chunk in which so many are prefilled: the one place that decides it."""
        config = self.config
        world = config.world_size if self.link else 1
        if config.prefill_plan:
            return planned_chunks(rows, config.prefill_plan)
        return prefill_chunks(rows, world, config.num_sub_sequences, config.max_sub_sequence_len)

    # --- what goes out ---------------------------------------------------------------------

    def _dispatch(self, flight: Flight) -> None:
        self.resting = False
        flight.began = time.perf_counter()
        for other in self.flights:
            other.alone = flight.alone = False
        flight.entries[0].copies, self.copies = self.copies, []
        self.stage.share(flight.crowd)
        # Before the layers, as whatever follows them has to be fetched into the caches anew.
        numbers = encode_batch(flight.entries, flight.crowd) if self.link else []
        hidden = self.stage.run(flight.entries, None)
        if self.link is None:
            self._land(flight, self.stage.judge(flight.entries, hidden))
            return
        self.flights.append(flight)
        self.link.send(1, Kind.BATCH, numbers, hidden)

    # --- what comes back -------------------------------------------------------------------

    def _land(self, flight: Flight, results: list[Result]) -> None:
        judged = [
            (entry, sequence)
            for entry, sequence in zip(flight.entries, flight.sequences, strict=True)
            if entry.judge is not Judge.NONE
        ]
        for (entry, sequence), result in zip(judged, results, strict=True):
            sequence.in_flight = False
            if sequence.finish_reason is None:
                self._advance(sequence, entry, result)
        if flight.tree is not None and flight.alone:
            self.drafting.timed(
                sum(len(entry.tokens) for entry in flight.entries),
                time.perf_counter() - flight.began,
                tree=flight.tree,
                heads=max(entry.draft_heads for entry in flight.entries),
            )
        if (news := self.drafting.news()) is not None:
            self.emit(news)

    def _advance(self, sequence: Sequence, entry: Entry, result: Result) -> None:
        tokens = [entry.tokens[node] for node in result.path[1:]] + [result.next_token]
        drafted = sequence.drafted
        sequence.drafted = Drafted(result.candidates, entry.draft_tree)
        if entry.judge is Judge.TREE:
            start, length = entry.start, len(result.path)
            sequence.count_step(length)
            sequence.fed = start + length
            # Rows that lie where they belong already need no move.
            moved = next((i for i, node in enumerate(result.path) if node != i), length)
            sequence.keep = [start + node for node in result.path[moved:]]
            sequence.keep_to = start + moved
        taken, pieces = sequence.take(tokens)
        if entry.judge is Judge.TREE:
            sequence.decode_tokens += len(taken)
            self.drafting.observe(drafted, taken)
        trace = (step_trace(self.codec, entry, result, pieces),) if sequence.trace else ()
        self._show(sequence, taken, "".join(pieces), trace)
        if sequence.finish_reason is not None:
            self._finish(sequence)

    def _show(
        self, sequence: Sequence, tokens: list[int], text: str, trace: tuple[StepTrace, ...] = ()
    ) -> None:
        if tokens or text:
            ids = tuple(tokens)
            name = sequence.request_id
            self.emit(Tokens(request_id=name, token_ids=ids, text=text, trace=trace))

    def _end(self, sequence: Sequence) -> None:
        """Finish what is not in the middle of a step."""
        self._show(sequence, [], sequence.stream.flush())
        self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        sequence.release()
        self.running.remove(sequence)
        self.full = False
        self.emit(sequence.finished())
