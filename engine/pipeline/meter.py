"""What a stage's time goes into; another thread may read it, the running span included."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from engine.protocol import FlightSpan

SPANS_KEPT = 256
Activity = Literal["busy", "wait", "link", "idle"]


class _Booked:
    """A block of one activity: a class, as it is entered several times in every step."""

    def __init__(self, meter: StageMeter, activity: Activity) -> None:
        self._meter, self._activity = meter, activity

    def __enter__(self) -> None:
        self._before = self._meter.switch(self._activity)

    def __exit__(self, *_: object) -> None:
        self._meter.switch(self._before)


@dataclass(frozen=True)
class Spent:
    """Seconds of each activity; together they are the time since the meter began."""

    busy: float
    wait: float
    link: float
    idle: float


class StageMeter:
    """Books every moment of a stage's main thread on exactly one activity.

    The thread is busy unless it says otherwise: `wait` is for a neighbour while there is work,
    `link` for moving a message, `idle` for waiting with nothing to do. Only that thread may call
    `during` and `count`; `spent` and the counters may be read from any.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.is_muted = False
        """What is computed now is no request's, and counts nowhere."""
        self._spent: dict[Activity, float] = {"busy": 0.0, "wait": 0.0, "link": 0.0, "idle": 0.0}
        self._activity: Activity = "busy"
        self._text = False
        self.moved = 0
        """Messages sent and received, and steps judged."""
        self.link_dtype = ""
        """In what form hidden states leave; empty where there is no link."""
        self.sent_bytes = 0
        self._since = clock()
        self.steps = 0
        """Micro-batches computed."""
        self.rows = 0
        """Rows of them."""
        self.decode_steps = 0
        self.decode_busy_s = 0.0
        """Computing seconds of the decode steps alone."""
        self.decode_judge_s = 0.0
        """Of them, those behind the layers: `lm_head`, heads, acceptance."""
        self.prefill_rows = 0
        self.prefill_busy_s = 0.0
        self._spans: deque[list[Any]] = deque(maxlen=SPANS_KEPT)
        """Fields of FlightSpan, whose objects are made when they are asked for."""
        self._since_1970 = time.time() - clock()

    def during(self, activity: Activity) -> _Booked:
        """Book the block on `activity`, and what follows on the one before."""
        return _Booked(self, activity)

    @contextmanager
    def at_text(self) -> Iterator[None]:
        """The block works on a text of any length: that it takes long is no hang."""
        self._text = True
        try:
            yield
        finally:
            self._text = False

    @property
    def doing(self) -> Activity | Literal["text"]:
        """The activity of this moment."""
        return "text" if self._text else self._activity

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Count no steps in the block: they are no request's. Its time is booked all the same."""
        self.is_muted = True
        try:
            yield
        finally:
            self.is_muted = False

    def switch(self, activity: Activity) -> Activity:
        """Book what follows on `activity`; returns the one before."""
        with self._lock:
            now = self._clock()
            before = self._activity
            self._spent[before] += now - self._since
            self._activity, self._since = activity, now
            return before

    def spent(self) -> Spent:
        """Seconds so far, up to this moment."""
        with self._lock:
            spent = dict(self._spent)
            spent[self._activity] += self._clock() - self._since
        return Spent(**spent)

    def spans(self) -> tuple[FlightSpan, ...]:
        """The latest micro-batches, oldest first."""
        return tuple(FlightSpan(*span) for span in tuple(self._spans))

    def count(
        self,
        rows: int,
        *,
        decode: bool,
        began: float,
        ended: float,
        points: Iterable[int],
    ) -> None:
        """A micro-batch of `rows` rows was passed through the layers, by the meter's clock.

        `points`: of each sequence in it the point of an outline answer, 0 for none.
        """
        self.steps += 1
        self.rows += rows
        at = self._since_1970
        self._spans.append([self.steps - 1, began + at, ended + at, rows, decode, tuple(points)])
        if decode:
            self.decode_steps += 1
        else:
            self.prefill_rows += rows
        self._add(decode=decode, seconds=ended - began)

    def count_judging(self, *, decode: bool, began: float, ended: float) -> None:
        """The micro-batch counted last was judged, by the meter's clock."""
        self._add(decode=decode, seconds=ended - began)
        if decode:
            self.decode_judge_s += ended - began
        self._spans[-1][2] = ended + self._since_1970

    def _add(self, *, decode: bool, seconds: float) -> None:
        if decode:
            self.decode_busy_s += seconds
        else:
            self.prefill_busy_s += seconds
