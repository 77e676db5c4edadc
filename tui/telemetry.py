"""What every stage does and how fast answers come: the figures, with their recent past.

Free of torch and of Textual. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Literal

from engine.protocol import (
    NODE_PIDS,
    TELEMETRY_INTERVAL_S,
    EngineReady,
    EventEnvelope,
    Failed,
    Finished,
    StageSpans,
    StageState,
    StageTelemetry,
    Started,
    Tokens,
    TreeChosen,
)
from engine.timeline import Timeline
from engine.updates import ClientState, StateChanged, Update

STALE_S = 3 * TELEMETRY_INTERVAL_S
"""A stage that was not heard for so long is stale."""
BUCKET_S = 0.5
"""Tokens are counted in spans of so many seconds."""
HISTORY = 600
"""Spans and samples kept: five minutes."""
REQUESTS_KEPT = 200
"""Requests whose time to the first token is kept."""
RATE_SPANS = 4
"""The rate of this moment is that of so many spans."""

Contact = Literal["waiting", "live", "stale", "disconnected"]


@dataclass(frozen=True)
class Shares:
    """Parts of a span of time, from 0 to 1; together they are 1."""

    busy: float
    wait: float
    link: float
    idle: float


@dataclass(frozen=True)
class StageView:
    """One stage at one moment; None where nothing was measured."""

    rank: int
    first_layer: int | None = None
    layers: int | None = None
    phase: str = "waiting"
    pid: int | None = None
    node: str = ""
    """The name of the machine, where it is another."""
    contact: Contact = "waiting"
    """"waiting": it has sent no figures yet."""
    age_s: float | None = None
    """Since its last figures came."""
    sample: StageTelemetry | None = None
    """The figures themselves."""
    shares: Shares | None = None
    """Of the time between its last two samples."""
    past: tuple[Shares, ...] = ()
    """The same for earlier samples, oldest first, this one included."""
    decode_step_ms: float | None = None
    """Computing time of a decode step, of those in the last sample that had any."""
    prefill_tokens_per_s: float | None = None
    """Prompt tokens over computing time, likewise."""
    link_step_ms: float | None = None
    """Link time over micro-batches, likewise."""
    link_step_bytes: float | None = None
    """Bytes sent over micro-batches, likewise; None where there is no link."""
    rows_per_s: float | None = None

    @property
    def memory_share(self) -> float | None:
        """Part of the memory there is that the stage holds."""
        sample = self.sample
        if sample is None or not sample.memory_total_bytes:
            return None
        return sample.memory_bytes / sample.memory_total_bytes


@dataclass(frozen=True)
class TelemetryView:
    """Everything at one moment."""

    at: float
    """By the store's clock."""
    state: str = ClientState.STARTING.value
    """One of ClientState's values."""
    reason: str = ""
    """Why the engine is dead, as far as it is known."""
    model: str | None = None
    stages: tuple[StageView, ...] = ()
    tokens_per_s: float | None = None
    """Of all requests, over the last RATE_SPANS spans."""
    token_rates: tuple[float | None, ...] = ()
    """Tokens per second in each past span, oldest first; None while no engine was ready."""
    tokens: int = 0
    """Tokens of this engine so far."""
    ttfts_s: tuple[float, ...] = ()
    """Time to the first token of the last requests, oldest first."""
    running: int = 0
    """Requests that are being answered."""
    finished: int = 0
    """Requests that have ended."""
    tree: TreeChosen | None = None
    """What the tuner of draft trees chose last; None where the tree is fixed."""

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token of the last request."""
        return self.ttfts_s[-1] if self.ttfts_s else None

    @property
    def ttft_median_s(self) -> float | None:
        """The median of those kept."""
        return median(self.ttfts_s) if self.ttfts_s else None


class _Stage:
    """What one rank has told in this launch."""

    def __init__(self) -> None:
        self.state: StageState | None = None
        self.sample: StageTelemetry | None = None
        self.heard_at = 0.0
        self.past: deque[Shares] = deque(maxlen=HISTORY)
        self.decode_step_ms: float | None = None
        self.prefill_tokens_per_s: float | None = None
        self.link_step_ms: float | None = None
        self.link_step_bytes: float | None = None
        self.rows_per_s: float | None = None

    def add(self, new: StageTelemetry, now: float) -> None:
        old, self.sample, self.heard_at = self.sample, new, now
        if old is None:
            return
        busy, wait = new.busy_s - old.busy_s, new.wait_s - old.wait_s
        link, idle = new.link_s - old.link_s, new.idle_s - old.idle_s
        span = busy + wait + link + idle
        if span <= 0:
            return
        self.past.append(Shares(busy / span, wait / span, link / span, idle / span))
        self.rows_per_s = (new.rows - old.rows) / span
        if new.steps > old.steps:
            self.link_step_ms = 1000 * link / (new.steps - old.steps)
            if new.link_dtype:
                sent = new.sent_bytes - old.sent_bytes
                self.link_step_bytes = sent / (new.steps - old.steps)
        if new.decode_steps > old.decode_steps:
            seconds = new.decode_busy_s - old.decode_busy_s
            self.decode_step_ms = 1000 * seconds / (new.decode_steps - old.decode_steps)
        if new.prefill_busy_s > old.prefill_busy_s:
            seconds = new.prefill_busy_s - old.prefill_busy_s
            self.prefill_tokens_per_s = (new.prefill_rows - old.prefill_rows) / seconds

    def view(self, rank: int, split: tuple[int, ...], now: float, *, dead: bool) -> StageView:
        state, sample = self.state, self.sample
        phase = state.phase if state else "waiting"
        age = None if sample is None else max(0.0, now - self.heard_at)
        contact: Contact = "waiting"
        if dead or phase == "stopped":
            contact = "disconnected"
        elif age is not None:
            contact = "stale" if age > STALE_S else "live"
        return StageView(
            rank=rank,
            first_layer=sum(split[:rank]) if rank < len(split) else None,
            layers=split[rank] if rank < len(split) else None,
            phase=phase,
            pid=state.pid % NODE_PIDS if state and state.pid else None,
            node=state.node if state else "",
            contact=contact,
            age_s=age,
            sample=sample,
            shares=self.past[-1] if self.past and contact == "live" else None,
            past=tuple(self.past),
            decode_step_ms=self.decode_step_ms,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            link_step_ms=self.link_step_ms,
            link_step_bytes=self.link_step_bytes,
            rows_per_s=self.rows_per_s if contact == "live" else None,
        )


class _TokenRates:
    """Tokens per second in spans of BUCKET_S; None in a span in which there was no engine."""

    def __init__(self, now: float) -> None:
        self._span = int(now / BUCKET_S)
        self._count = 0
        self._alive = False
        self.past: deque[float | None] = deque(maxlen=HISTORY)

    def advance(self, now: float, alive: bool) -> None:
        """Close the spans that have passed; `alive` holds from now on."""
        span = int(now / BUCKET_S)
        for _ in range(min(span - self._span, HISTORY + 1)):
            self.past.append(self._count / BUCKET_S if self._alive else None)
            self._count = 0
        self._span = max(span, self._span)
        self._alive = alive

    def add(self, tokens: int) -> None:
        self._count += tokens

    def now(self) -> float | None:
        last = [r for r in islice(reversed(self.past), RATE_SPANS) if r is not None]
        return sum(last) / len(last) if last and self._alive else None


class TelemetryStore:
    """Collects the figures of one engine after another from the client's updates."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._epoch = 0
        self._state = ClientState.STARTING
        self._reason = ""
        self._ready: EngineReady | None = None
        self._tree: TreeChosen | None = None
        self._stages: dict[int, _Stage] = {}
        self.timeline = Timeline()
        """The latest micro-batches of this launch."""
        self._running: set[str] = set()
        self._finished = 0
        self._tokens = 0
        self._rates = _TokenRates(clock())
        self._ttfts: deque[float] = deque(maxlen=REQUESTS_KEPT)

    def on_update(self, update: Update) -> None:
        """Take an update of the engine client."""
        now = self._clock()
        match update:
            case StateChanged(state=state, reason=reason):
                self._state, self._reason = state, reason
                if state in (ClientState.DEAD, ClientState.RECOVERING):
                    self._running.clear()  # those of a recovering engine start once more
            case EventEnvelope() if update.rank >= 0:
                self._take(update, now)
        self._rates.advance(now, self._alive)

    @property
    def _alive(self) -> bool:
        return self._ready is not None and self._state is not ClientState.DEAD

    def _take(self, envelope: EventEnvelope, now: float) -> None:
        if envelope.epoch > self._epoch:
            self._begin(envelope.epoch)
        elif envelope.epoch < self._epoch:
            return
        stage = self._stages.setdefault(envelope.rank, _Stage())
        match envelope.body:
            case StageState() as state:
                stage.state = state
            case StageTelemetry() as sample:
                stage.add(sample, now)
            case EngineReady() as ready:
                self._ready = ready
                if self._state is not ClientState.BUSY:
                    self._state = ClientState.READY
            case StageSpans(spans):
                self.timeline.add(envelope.rank, spans)
            case TreeChosen() as tree:
                self._tree = tree
            case Started() as started:
                self._running.add(started.request_id)
            case Tokens() as tokens:
                self._rates.advance(now, self._alive)
                self._rates.add(len(tokens.token_ids))
                self._tokens += len(tokens.token_ids)
            case Finished() as finished:
                self._end(finished.request_id)
                if finished.metrics.ttft_s is not None:
                    self._ttfts.append(finished.metrics.ttft_s)
            case Failed() as failed:
                self._end(failed.request_id)

    def _end(self, request_id: str) -> None:
        self._running.discard(request_id)
        self._finished += 1

    def _begin(self, epoch: int) -> None:
        """A new launch: what the last one told is void, but for the histories of answers."""
        self._epoch = epoch
        self._stages.clear()
        self.timeline = Timeline()
        if self._state is ClientState.RECOVERING:
            return  # the same engine, only that its stages meet anew
        if self._state is not ClientState.RESPAWNING:
            self._state = ClientState.STARTING
        self._ready, self._tree, self._reason = None, None, ""
        self._running.clear()
        self._finished = self._tokens = 0

    def view(self, split: tuple[int, ...] = ()) -> TelemetryView:
        """Everything as it is now.

        Args:
            split: layers per stage as far as they are known before the engine tells them.
        """
        now = self._clock()
        self._rates.advance(now, self._alive)
        ready = self._ready
        split = tuple(ready.stages) if ready else split
        count = max(len(split), 0, *(rank + 1 for rank in self._stages))
        dead = self._state is ClientState.DEAD
        return TelemetryView(
            at=now,
            state=self._state.value,
            reason=self._reason,
            model=ready.model if ready else None,
            stages=tuple(
                self._stages.get(rank, _Stage()).view(rank, split, now, dead=dead)
                for rank in range(count)
            ),
            tokens_per_s=self._rates.now(),
            token_rates=tuple(self._rates.past),
            tokens=self._tokens,
            ttfts_s=tuple(self._ttfts),
            running=len(self._running),
            finished=self._finished,
            tree=self._tree,
        )
