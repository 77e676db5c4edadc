"""The course of a training run, from the shared queue as it happens and from logging.jsonl.

Free of Textual and torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from engine.protocol import TrainingStep

MOST_POINTS = 4096
"""Beyond this every second point is left out: no terminal has more columns."""


@dataclass(frozen=True, slots=True)
class Point:
    """The figures of a step, or the means of the steps that one line of the log stands for."""

    iteration: int
    loss_per_head: tuple[float, ...]
    accuracy_per_head: tuple[float, ...]
    base_loss: float | None
    base_accuracy: float | None
    lr: float
    tokens_per_s: float | None
    memory_bytes: int
    memory_kind: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of the rows held out, after so many steps."""

    iteration: int
    loss_per_head: tuple[float, ...]
    accuracy_per_head: tuple[float, ...]
    accuracy: float | None = None
    """Of the base model, where there are no heads."""


class _Record(msgspec.Struct):
    """A line of logging.jsonl: of a step, or of an evaluation."""

    iteration: int
    train_iters: int = 0
    loss: float | None = None
    accuracy: float | None = None
    """The model's own, where it learns without heads."""
    loss_per_head: tuple[float, ...] | None = None
    accuracy_per_head: tuple[float, ...] = ()
    base_loss: float | None = None
    learning_rate: float = 0.0
    tokens_per_s: float | None = None
    memory_bytes: int = 0
    memory_kind: str = "process"
    elapsed_s: float | None = None
    remaining_s: float | None = None
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    eval_loss_per_head: tuple[float, ...] | None = None
    eval_accuracy_per_head: tuple[float, ...] = ()


@dataclass
class History:
    """What is known of a run so far; points in the order of their steps."""

    points: list[Point] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    total: int | None = None
    iteration: int | None = None
    """Steps done."""
    elapsed_s: float | None = None
    """Since the first step of the run's latest start."""
    remaining_s: float | None = None
    unreadable: int = 0
    """Lines of logging.jsonl that are not what a run writes."""

    def started(self, iteration: int, total: int) -> None:
        """The run goes on from so many steps."""
        self.iteration, self.total = iteration, total

    def add_step(self, step: TrainingStep) -> None:
        """A step from the shared queue: closer than what the log says of it."""
        self._progress(step.iteration, step.total, step.elapsed_s, step.remaining_s)
        if self.points and self.points[-1].iteration == step.iteration:
            self.points.pop()
        self._append(
            Point(
                iteration=step.iteration,
                loss_per_head=step.loss_per_head,
                accuracy_per_head=step.accuracy_per_head,
                base_loss=step.base_loss,
                base_accuracy=step.base_accuracy,
                lr=step.lr,
                tokens_per_s=step.tokens_per_s,
                memory_bytes=step.memory_bytes,
                memory_kind=step.memory_kind,
            )
        )

    def add_line(self, line: str) -> None:
        """A line of logging.jsonl; what the queue has told already is left as it is."""
        try:
            record = msgspec.json.decode(line, type=_Record)
        except msgspec.DecodeError:
            self.unreadable += 1
            return
        if record.eval_loss_per_head is not None or record.eval_loss is not None:
            self.evaluations.append(
                Evaluation(
                    record.iteration,
                    record.eval_loss_per_head or (),
                    record.eval_accuracy_per_head,
                    record.eval_accuracy,
                )
            )
            return
        if self.iteration is None or record.iteration > self.iteration:
            self._progress(
                record.iteration, record.train_iters, record.elapsed_s, record.remaining_s
            )
        alone = record.accuracy is not None  # the model learns, and no heads
        if record.loss_per_head is None and not alone:
            return
        self._append(
            Point(
                iteration=record.iteration,
                loss_per_head=record.loss_per_head or (),
                accuracy_per_head=record.accuracy_per_head,
                base_loss=record.loss if alone else record.base_loss,
                base_accuracy=record.accuracy,
                lr=record.learning_rate,
                tokens_per_s=record.tokens_per_s,
                memory_bytes=record.memory_bytes,
                memory_kind=record.memory_kind,
            )
        )

    def _progress(
        self, iteration: int, total: int, elapsed_s: float | None, remaining_s: float | None
    ) -> None:
        if self.iteration is None or iteration >= self.iteration:
            self.iteration, self.elapsed_s = iteration, elapsed_s
            self.total, self.remaining_s = total or self.total, remaining_s

    def _append(self, point: Point) -> None:
        if self.points and point.iteration <= self.points[-1].iteration:
            return
        self.points.append(point)
        if len(self.points) > MOST_POINTS:
            self.points = [*self.points[:-1:2], self.points[-1]]

    @property
    def last(self) -> Point | None:
        """The latest figures."""
        return self.points[-1] if self.points else None


class Tail:
    """The lines of a file that is being written, each once it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        self._rest = b""

    def new_lines(self) -> list[str]:
        """What has been added since the last call; none while there is no file."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._at)
                data = file.read()
        except OSError:
            return []
        self._at += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole]
