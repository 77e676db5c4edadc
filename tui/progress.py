"""What a batch run says on stderr: a live bar, plain lines, or JSON; never on stdout."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from engine.client import ClientState, Fetching, StateChanged, Update
from engine.protocol import EventEnvelope, Notice, StageState
from tui.batch_input import BatchRequest
from tui.text import harmless

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Mode = Literal["auto", "json", "none"]
PREFIX = "jupiter-tui: "
SAY_EVERY_S = 10.0
SHOWN_FAILURES = 10


@dataclass
class Tally:
    """What has been done so far; only `done` and `failed` lines are in the output."""

    todo: int
    """Lines to be asked in this run."""
    skipped: int = 0
    """Lines that an earlier run answered."""
    done: int = 0
    failed: int = 0
    tokens: int = 0
    """Completion tokens of the lines done."""
    streamed: int = 0
    """Tokens seen so far, also of lines that are not done."""
    began: float = field(default_factory=time.monotonic)

    def restart(self) -> None:
        """The first line can be asked now."""
        self.began = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the first line could be asked."""
        return time.monotonic() - self.began

    def rate(self, tokens: int) -> float | None:
        """`tokens` a second, None before any time has passed."""
        return tokens / self.elapsed_s if self.elapsed_s > 0 else None

    def figures(self) -> dict[str, Any]:
        """For the summary, as JSON has it."""
        rate = self.rate(self.tokens)
        return {
            "done": self.done,
            "failed": self.failed,
            "skipped": self.skipped,
            "left": self.todo - self.done - self.failed,
            "tokens": self.tokens,
            "tokens_per_s": None if rate is None else round(rate, 2),
            "elapsed_s": round(self.elapsed_s, 3),
        }


class Reporter:
    """Says only what went wrong; the base of the others."""

    def engine(self, update: Update) -> None:
        """Take an update of the engine client; a notice is passed on."""
        if isinstance(update, EventEnvelope) and isinstance(update.body, Notice):
            self.warn(update.body.message)
        elif isinstance(update, StateChanged) and update.state is ClientState.RECOVERING:
            self.warn(update.reason)

    def start(self, tally: Tally) -> None:
        """The engine is ready and the first line is about to be asked."""

    def tokens(self, tally: Tally) -> None:
        """Tokens came in."""

    def line(self, tally: Tally, request: BatchRequest, failure: str | None) -> None:
        """A line was answered, or failed for the reason given."""

    def note(self, text: str) -> None:
        """Say something of no consequence."""

    def warn(self, text: str) -> None:
        """Say something to be looked at."""
        self._say(text)

    def error(self, text: str) -> None:
        """Say why the run ends."""
        self._say(text)

    def summary(self, tally: Tally) -> None:
        """Say what was done in all."""

    def close(self) -> None:
        """Leave the terminal as it was; idempotent."""

    def _say(self, text: str) -> None:
        _to_stderr("".join(f"{PREFIX}{harmless(line)}\n" for line in text.splitlines()))


class JsonReporter(Reporter):
    """One JSON object per line; see docs/batch.md for the fields."""

    def __init__(self) -> None:
        self._stages: dict[int, tuple[str, float]] = {}

    def engine(self, update: Update) -> None:
        super().engine(update)
        if isinstance(update, Fetching):
            self._emit("fetch", message=update.message)
        elif isinstance(update, EventEnvelope) and isinstance(update.body, StageState):
            self._stage(update.rank, update.body)

    def _stage(self, rank: int, state: StageState) -> None:
        """Each phase, and every second how far it is: a model has hundreds of tensors."""
        now = time.monotonic()
        phase, said = self._stages.get(rank, ("", now))
        if phase != state.phase or now - said >= 1.0:
            self._stages[rank] = state.phase, now
            self._emit("stage", rank=rank, phase=state.phase, done=state.done, total=state.total)

    def start(self, tally: Tally) -> None:
        self._emit("start", todo=tally.todo, skipped=tally.skipped)

    def line(self, tally: Tally, request: BatchRequest, failure: str | None) -> None:
        self._emit(
            "line",
            custom_id=request.custom_id,
            line=request.line,
            error=failure,
            **tally.figures(),
        )

    def note(self, text: str) -> None:
        self._emit("note", message=text)

    def warn(self, text: str) -> None:
        self._emit("warning", message=text)

    def error(self, text: str) -> None:
        for line in text.splitlines():
            self._emit("error", message=line)

    def summary(self, tally: Tally) -> None:
        self._emit("summary", **tally.figures())

    def _emit(self, event: str, **fields: Any) -> None:
        _to_stderr(json.dumps({"event": event, **fields}) + "\n")


class PlainReporter(Reporter):
    """Lines for a log file, not more often than every ten seconds."""

    def __init__(self) -> None:
        self._said = time.monotonic()
        self._stages: dict[int, str] = {}

    def engine(self, update: Update) -> None:
        super().engine(update)
        if isinstance(update, Fetching):
            self._now_and_then(update.message)
        elif isinstance(update, EventEnvelope) and isinstance(update.body, StageState):
            self._stage(update.rank, update.body)

    def _stage(self, rank: int, state: StageState) -> None:
        if self._stages.get(rank) != state.phase and state.phase in ("loading", "ready"):
            self._say(f"stage {rank}: {state.phase}")
        self._stages[rank] = state.phase

    def start(self, tally: Tally) -> None:
        skipped = f", {tally.skipped} are answered already" if tally.skipped else ""
        self._say(f"{_count(tally.todo, 'line')} to do{skipped}")

    def line(self, tally: Tally, request: BatchRequest, failure: str | None) -> None:
        if failure is not None and tally.failed <= SHOWN_FAILURES:
            self._say(f"line {request.line} ({request.custom_id}) failed: {failure}")
            if tally.failed == SHOWN_FAILURES:
                self._say("further failures are only counted; each is in the output")
        figures = tally.figures()
        self._now_and_then(
            f"{tally.done + tally.failed} of {tally.todo} · {tally.failed} failed · "
            f"{figures['tokens_per_s'] or 0:.1f} tokens/s"
        )

    def note(self, text: str) -> None:
        self._say(text)

    def summary(self, tally: Tally) -> None:
        figures = tally.figures()
        left = f", {figures['left']} not done" if figures["left"] else ""
        self._say(
            f"{tally.done} done, {tally.failed} failed, {tally.skipped} skipped{left}; "
            f"{_count(tally.tokens, 'token')} in {tally.elapsed_s:.1f} s "
            f"({figures['tokens_per_s'] or 0:.1f} tokens/s)"
        )

    def _now_and_then(self, text: str) -> None:
        if time.monotonic() - self._said >= SAY_EVERY_S:
            self._said = time.monotonic()
            self._say(text)


class LiveReporter(PlainReporter):
    """A bar at the bottom of the terminal; lines go above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        super().__init__()
        self._bar: Progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            refresh_per_second=4,
        )
        self._task: TaskID = self._bar.add_task("starting", total=None, detail="")
        self._loading: dict[int, StageState] = {}
        self._working = self._ended = False

    def engine(self, update: Update) -> None:
        if not self._ended:
            self._bar.start()
        if isinstance(update, Fetching):
            self._bar.update(self._task, description=harmless(update.message))
        else:
            super().engine(update)

    def _stage(self, rank: int, state: StageState) -> None:
        if self._working or not state.total:
            return
        self._loading[rank] = state
        self._bar.update(
            self._task,
            description="loading",
            completed=sum(stage.done for stage in self._loading.values()),
            total=sum(stage.total for stage in self._loading.values()),
            detail="tensors",
        )

    def start(self, tally: Tally) -> None:
        self._working = True
        self._bar.reset(self._task, total=tally.todo, description="batch", detail="")
        super().start(tally)

    def tokens(self, tally: Tally) -> None:
        failed = f"· {tally.failed} failed " if tally.failed else ""
        rate = tally.rate(tally.streamed) or 0.0
        self._bar.update(self._task, detail=f"{failed}· {rate:.1f} tokens/s")

    def line(self, tally: Tally, request: BatchRequest, failure: str | None) -> None:
        super().line(tally, request, failure)
        self._bar.update(self._task, completed=tally.done + tally.failed)
        self.tokens(tally)

    def _now_and_then(self, text: str) -> None:
        """The bar says it all the time."""

    def summary(self, tally: Tally) -> None:
        self.close()
        super().summary(tally)

    def close(self) -> None:
        self._ended = True
        self._bar.stop()

    def _say(self, text: str) -> None:
        if not self._bar.live.is_started:
            super()._say(text)
            return
        for line in text.splitlines():
            self._bar.console.print(
                PREFIX + harmless(line), markup=False, highlight=False, soft_wrap=True
            )


def make_reporter(mode: Mode, *, answers_on_terminal: bool) -> Reporter:
    """The reporter for `--progress`; a bar only where it is alone on a terminal.

    Args:
        answers_on_terminal: the output lines go to the terminal as well.
    """
    if mode == "json":
        return JsonReporter()
    if mode == "none":
        return Reporter()
    dumb = os.environ.get("TERM", "dumb") == "dumb"
    if sys.stderr is None or not sys.stderr.isatty() or answers_on_terminal or dumb:
        return PlainReporter()
    return LiveReporter()


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _to_stderr(text: str) -> None:
    """Nobody may be there to read it (a closed terminal, `2>&1 | head`): the work goes on."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        return
