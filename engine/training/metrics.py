"""What is told of a run: logging.jsonl, TensorBoard, plots, progress on stderr, queue events.

Only rank 0 tells; the figures are those of all ranks.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TextIO

import psutil
import torch

from engine.endpoint import Endpoint
from engine.errors import EngineError
from engine.protocol import TrainingStarted, TrainingStep
from engine.training.args import TrainArguments
from engine.training.figures import Losses, Step
from engine.training.plots import write_plot
from engine.training.progress import Progress
from engine.training.tensorboard import EventWriter

LOG = "logging.jsonl"


class RunLog:
    """Tells of a run as it goes on.

    Args:
        total: steps of the run.
        has_base: the first loss is the base's, not a head's.
        has_heads: there are others; without, the figures of the base are the run's own.

    Raises:
        EngineError: from every method, when the run folder cannot be written.
    """

    def __init__(
        self,
        run: Path,
        args: TrainArguments,
        *,
        total: int,
        has_base: bool,
        has_heads: bool = True,
        stderr: TextIO | None = None,
    ) -> None:
        self.run, self.args, self.total = run, args, total
        self.has_base, self.has_heads = has_base, has_heads
        folder = Path(args.tensorboard_dir).expanduser() if args.tensorboard_dir else run / "runs"
        with _writing(folder):
            self.board = EventWriter(folder, args.tensorboard_queue_size)
        self.progress = Progress(args, stderr)
        self.note = self.progress.note
        self.endpoint = _connect()
        self._began = 0.0
        self._first: int | None = None
        self._since: list[Step] = []

    def started(self, iteration: int) -> None:
        """All is read, and `iteration` steps were done before: the run begins."""
        if self.endpoint is not None:
            run = str(self.run)
            self.endpoint.send(TrainingStarted(run=run, iteration=iteration, total=self.total))

    def step(self, step: Step) -> None:
        """A step is done: tell it where its turn has come."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._began = step.iteration - 1, now - step.seconds
        self._since.append(step)
        elapsed = now - self._began
        remaining = elapsed / (step.iteration - self._first) * (self.total - step.iteration)
        if self.endpoint is not None:
            self.endpoint.send(self._event(step, elapsed, remaining))
        if step.iteration % self.args.tensorboard_log_interval == 0:
            with _writing(self.run):
                self.board.add(step.iteration, self._scalars(step))
        record = None
        if step.iteration % self.args.log_interval == 0 or step.iteration == self.total:
            record = self._record(elapsed, remaining)
            self._append(record)
            self._since.clear()
        self.progress.step(step, self.total, remaining, record)

    def evaluation(self, iteration: int, losses: Losses) -> None:
        """The figures of the rows held out."""
        record = {
            "iteration": iteration,
            **self._figures("eval_", losses.loss, losses.each, losses.accuracy, losses.dropped),
        }
        self._append(record)
        scalars = {"eval/loss": losses.loss, **self._per_loss("eval", losses)}
        if self.args.log_validation_ppl_to_tensorboard:
            for name, value in zip(self._names(losses), losses.each, strict=True):
                scalars[f"eval/perplexity/{name}"] = math.exp(min(value, 80.0))
        with _writing(self.run):
            self.board.add(iteration, scalars)
        self.progress.evaluation(record)

    def plot(self) -> None:
        """Draw the curves of logging.jsonl so far."""
        images = self.run / "images"
        with _writing(images):
            path = self.run / LOG
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            records = [json.loads(line) for line in text.splitlines()]
            for key, title in (("loss", "loss"), ("accuracy", "top-1 accuracy")):
                write_plot(images / f"{key}.svg", title, _curves(records, key))
            rates = {
                name: [(r["iteration"], r[key]) for r in records if key in r]
                for name, key in (("heads", "learning_rate"), ("base", "base_learning_rate"))
            }
            write_plot(images / "learning_rate.svg", "learning rate", rates)

    def close(self) -> None:
        """Write what is held back; as well as can be, for the run may have ended of an error."""
        with suppress(OSError):
            self.board.flush()
        self.progress.close()
        if self.endpoint is not None:
            self.endpoint.close()

    def _record(self, elapsed: float, remaining: float) -> dict[str, Any]:
        """The line of logging.jsonl: losses are means over the steps since the last."""
        steps, last = self._since, self._since[-1]
        record: dict[str, Any] = {
            "iteration": last.iteration,
            "train_iters": self.total,
            **self._figures(
                "",
                sum(step.losses.loss for step in steps) / len(steps),
                _means([step.losses.each for step in steps]),
                _means([step.losses.accuracy for step in steps]),
                sum(step.losses.dropped for step in steps),
            ),
            "learning_rate": last.lr,
            **({} if last.base_lr is None else {"base_learning_rate": last.base_lr}),
            # JSON knows no infinity: a step of float16 that overflowed has no norm.
            "grad_norm": last.grad_norm if math.isfinite(last.grad_norm) else None,
            **({} if last.loss_scale is None else {"loss_scale": last.loss_scale}),
            **({} if last.params_norm is None else {"params_norm": last.params_norm}),
        }
        if self.args.log_throughput:
            seconds = sum(step.seconds for step in steps)
            record["tokens_per_s"] = sum(step.tokens for step in steps) / seconds
        return record | {
            "memory_bytes": last.memory[0],
            "memory_bytes_per_rank": last.memory,
            "memory_kind": memory_kind(),
            "elapsed_s": elapsed,
            "remaining_s": remaining,
            "consumed_samples": last.consumed_samples,
        }

    def _figures(
        self,
        prefix: str,
        loss: float,
        each: Sequence[float],
        accuracy: Sequence[float],
        dropped: int,
    ) -> dict[str, Any]:
        """The losses of a record; of the base and of each head where there are heads."""
        if not self.has_heads:
            return {f"{prefix}loss": loss, f"{prefix}accuracy": accuracy[0]}
        first = int(self.has_base)
        return {
            f"{prefix}loss": loss,
            **({f"{prefix}base_loss": each[0]} if self.has_base else {}),
            f"{prefix}loss_per_head": each[first:],
            f"{prefix}accuracy_per_head": accuracy[first:],
            f"{prefix}dropped_targets": dropped,
        }

    def _event(self, step: Step, elapsed: float, remaining: float) -> TrainingStep:
        first = int(self.has_base)
        return TrainingStep(
            iteration=step.iteration,
            total=self.total,
            loss=step.losses.loss,
            loss_per_head=step.losses.each[first:],
            accuracy_per_head=step.losses.accuracy[first:],
            base_loss=step.losses.each[0] if self.has_base else None,
            base_accuracy=step.losses.accuracy[0] if self.has_base else None,
            lr=step.lr,
            grad_norm=step.grad_norm,
            tokens_per_s=step.tokens_per_s,
            memory_bytes=step.memory[0],
            memory_kind=memory_kind(),
            elapsed_s=elapsed,
            remaining_s=remaining,
        )

    def _scalars(self, step: Step) -> dict[str, float]:
        args = self.args
        scalars = {"train/loss": step.losses.loss, "train/grad_norm": step.grad_norm}
        if step.loss_scale is not None:
            scalars["train/loss_scale"] = step.loss_scale
        scalars |= self._per_loss("train", step.losses)
        if step.params_norm is not None:
            scalars["train/params_norm"] = step.params_norm
        if not args.no_log_learning_rate_to_tensorboard:
            scalars["train/learning_rate"] = step.lr
            if step.base_lr is not None:
                scalars["train/base_learning_rate"] = step.base_lr
        if args.log_throughput:
            scalars["train/tokens_per_s"] = step.tokens_per_s
        if args.log_timers_to_tensorboard:
            scalars["train/step_s"] = step.seconds
        if args.log_memory_to_tensorboard:
            scalars["train/memory_bytes"] = float(step.memory[0])
        return scalars

    def _per_loss(self, prefix: str, losses: Losses) -> dict[str, float]:
        names = self._names(losses)
        found = {f"{prefix}/loss/{n}": v for n, v in zip(names, losses.each, strict=True)}
        return found | {
            f"{prefix}/accuracy/{n}": v for n, v in zip(names, losses.accuracy, strict=True)
        }

    def _names(self, losses: Losses) -> list[str]:
        heads = [f"head_{head}" for head in range(len(losses.each) - int(self.has_base))]
        return ["base", *heads] if self.has_base else heads

    def _append(self, record: dict[str, Any]) -> None:
        with _writing(self.run / LOG), (self.run / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def memory_bytes() -> int:
    """Resident memory of this process, or what it has had on its GPU at most."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


def memory_kind() -> Literal["process", "device"]:
    """Which of the two `memory_bytes` is."""
    return "device" if torch.cuda.is_available() else "process"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EngineError(f"{path}: cannot be written: {error.strerror}") from None


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _curves(records: Sequence[dict[str, Any]], key: str) -> dict[str, list[tuple[float, float]]]:
    """The curves of a figure, training and evaluation: the total (losses) and each head's."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for prefix, label in (("", ""), ("eval_", "eval ")):
            if key == "loss" and f"{prefix}loss" in record:
                point = (record["iteration"], record[f"{prefix}loss"])
                curves.setdefault(f"{label}total", []).append(point)
            if key == "accuracy" and f"{prefix}accuracy" in record:
                point = (record["iteration"], record[f"{prefix}accuracy"])
                curves.setdefault(f"{label}total", []).append(point)
            for head, value in enumerate(record.get(f"{prefix}{key}_per_head", ())):
                point = (record["iteration"], value)
                curves.setdefault(f"{label}head {head}", []).append(point)
    return curves


def _connect() -> Endpoint | None:
    """The shared queue, where the one who started this run has opened one."""
    events, commands = os.environ.get("JUPITER_EVENTS"), os.environ.get("JUPITER_COMMANDS")
    if not events or not commands:
        return None
    return Endpoint(events, commands, rank=0, epoch=int(os.environ.get("JUPITER_EPOCH", "0")))
