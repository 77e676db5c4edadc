"""What `jupiter medusa generate` and `jupiter infer` say on stderr while they work."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from typing import Any

from engine.client import Fetching, Update
from engine.errors import harmless
from engine.protocol import EventEnvelope, Notice, StageState
from engine.training.args_run import ProgressMode

PREFIX = "jupiter medusa generate: "
SHOWN_FAILURES = 10
SAY_EVERY_S = 10.0
REDRAW_EVERY_S = 0.25


class Progress:
    """Counts what is done; says only what went wrong, as with `--progress none`."""

    prefix = PREFIX

    def __init__(self, todo: int, skipped: int) -> None:
        self.todo, self.skipped = todo, skipped
        self.done = self.failed = self._tokens = 0
        self._began = time.monotonic()
        self._phases: dict[int, str] = {}

    def engine(self, update: Update) -> None:
        """Take an update of the engine's client."""
        if isinstance(update, Fetching):
            self.note(update.message)
        elif isinstance(update, EventEnvelope) and isinstance(update.body, Notice):
            self._say(update.body.message)
        elif isinstance(update, EventEnvelope) and isinstance(update.body, StageState):
            phase = update.body.phase
            if self._phases.get(update.rank) != phase:
                self._phases[update.rank] = phase
                self._stage(update.rank, phase)

    def start(self) -> None:
        """The engine is ready: time counts from here."""
        self._began = time.monotonic()
        answered = f", {self.skipped} are answered already" if self.skipped else ""
        self.note(f"{self.todo} prompts to answer{answered}")

    def tokens(self, count: int) -> None:
        """So many tokens came in."""
        self._tokens += count

    def answered(self, name: str, failure: str | None) -> None:
        """A prompt is done, or failed for the reason given."""
        self.done += failure is None
        self.failed += failure is not None
        if failure is not None and self.failed <= SHOWN_FAILURES:
            self._say(f"{name}: not answered: {failure}")
            if self.failed == SHOWN_FAILURES:
                self._say("further failures are only counted")

    def note(self, text: str) -> None:
        """Say something of no consequence."""

    def summary(self) -> None:
        """Say what was done in all."""

    def figures(self) -> dict[str, Any]:
        """Counts, tokens per second and seconds left (None before anything is known)."""
        seconds = time.monotonic() - self._began
        finished = self.done + self.failed
        left = self.todo - finished
        return {
            "done": self.done,
            "failed": self.failed,
            "skipped": self.skipped,
            "left": left,
            "tokens": self._tokens,
            "tokens_per_s": round(self._tokens / seconds, 2) if seconds > 0 else None,
            "elapsed_s": round(seconds, 1),
            "remaining_s": round(seconds / finished * left, 1) if finished else None,
        }

    def _stage(self, rank: int, phase: str) -> None:
        """A stage of the engine has come so far."""

    def _say(self, text: str) -> None:
        # An id or a message may hold what a terminal takes for orders.
        _to_stderr(f"{self.prefix}{harmless(text)}\n")


class JsonProgress(Progress):
    """One JSON object per line: start, answer, note, error, summary."""

    def start(self) -> None:
        super().start()
        self._emit("start", **self.figures())

    def answered(self, name: str, failure: str | None) -> None:
        super().answered(name, failure)
        self._emit("answer", id=name, error=failure, **self.figures())

    def note(self, text: str) -> None:
        self._emit("note", message=text)

    def summary(self) -> None:
        self._emit("summary", **self.figures())

    def _stage(self, rank: int, phase: str) -> None:
        self._emit("stage", rank=rank, phase=phase)

    def _say(self, text: str) -> None:
        self._emit("warning", message=text)

    def _emit(self, event: str, **fields: Any) -> None:
        _to_stderr(json.dumps({"event": event, **fields}) + "\n")


class PlainProgress(Progress):
    """Lines for a log file, or one line that is drawn anew on a terminal."""

    def __init__(self, todo: int, skipped: int, *, terminal: bool) -> None:
        super().__init__(todo, skipped)
        self._terminal = terminal
        self._said = time.monotonic()
        self._drawn = False

    def tokens(self, count: int) -> None:
        super().tokens(count)
        if self._terminal:
            self._now_and_then(REDRAW_EVERY_S)

    def answered(self, name: str, failure: str | None) -> None:
        super().answered(name, failure)
        self._now_and_then(REDRAW_EVERY_S if self._terminal else SAY_EVERY_S)

    def note(self, text: str) -> None:
        self._say(text)

    def summary(self) -> None:
        figures = self.figures()
        left = f", {figures['left']} left" if figures["left"] else ""
        self._say(
            f"{self.done} answered, {self.failed} failed, {self.skipped} were answered before"
            f"{left}; {self._tokens} tokens in {_duration(figures['elapsed_s'])}"
        )

    def _stage(self, rank: int, phase: str) -> None:
        if phase in ("loading", "ready"):
            self._say(f"stage {rank}: {phase}")

    def _now_and_then(self, seconds: float) -> None:
        now = time.monotonic()
        if now - self._said < seconds:
            return
        self._said = now
        figures = self.figures()
        failed = f" · {self.failed} failed" if self.failed else ""
        left = figures["remaining_s"]
        remaining = "" if left is None else f" · {_duration(left)} left"
        line = (
            f"{self.done + self.failed} of {self.todo}{failed} · "
            f"{figures['tokens_per_s'] or 0:.1f} tokens/s{remaining}"
        )
        if self._terminal:
            _to_stderr(f"\r\x1b[K{self.prefix}{line}")
            self._drawn = True
        else:
            super()._say(line)

    def _say(self, text: str) -> None:
        if self._drawn:
            _to_stderr("\r\x1b[K")
            self._drawn = False
        super()._say(text)


def make_progress(mode: ProgressMode, todo: int, *, skipped: int, prefix: str = PREFIX) -> Progress:
    """The progress for `--progress`; lines for people begin with `prefix`."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if mode == "json":
        made: Progress = JsonProgress(todo, skipped)
    elif mode == "none":
        made = Progress(todo, skipped)
    else:
        made = PlainProgress(todo, skipped, terminal=terminal)
    made.prefix = prefix
    return made


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _to_stderr(text: str) -> None:
    """Nobody may be there to read it (a closed terminal): the work goes on."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        return
