"""What a run says on stderr: one line that is rewritten on a terminal, else a line each log step.

With `--progress json` every line is a JSON object with an `event`, for other programs.
"""

from __future__ import annotations

import json
import sys
from typing import Any, TextIO

from engine.training.args import TrainArguments
from engine.training.figures import Step

LEVELS = ("debug", "info", "warning", "error")


class Progress:
    """Says what `progress` and `logging_level` ask for."""

    def __init__(self, args: TrainArguments, stderr: TextIO | None = None) -> None:
        self.args = args
        self.stderr = stderr or sys.stderr
        self.as_json = args.progress == "json"
        silent = args.progress == "none" or LEVELS.index(args.logging_level or "info") > 1
        self.silent = silent
        self.live = not self.as_json and self.stderr.isatty()

    def note(self, message: str) -> None:
        """Something a person should know."""
        self._say(message, {"event": "note", "message": message})

    def step(
        self, step: Step, total: int, remaining_s: float, record: dict[str, Any] | None
    ) -> None:
        """A step is done; `record` is its line of logging.jsonl if it has one."""
        if record is None and not self.live and self.args.logging_level != "debug":
            return
        line = (
            f"step {step.iteration}/{total}  loss {step.losses.loss:.4f}  lr {step.lr:.2e}  "
            f"{step.tokens_per_s:.0f} tokens/s  {span(remaining_s)} left"
        )
        self._say(line, {"event": "step", **(record or {})}, end="" if self.live else "\n")

    def evaluation(self, record: dict[str, Any]) -> None:
        """An evaluation is done; `record` is its line of logging.jsonl."""
        rates = record.get("eval_accuracy_per_head") or [record["eval_accuracy"]]
        accuracy = " ".join(f"{value:.3f}" for value in rates)
        line = (
            f"evaluation at {record['iteration']}: loss {record['eval_loss']:.4f}, top-1 {accuracy}"
        )
        self._say(line, {"event": "evaluation", **record})

    def close(self) -> None:
        """Leave the terminal's line clean."""
        if self.live and not self.silent:
            print("\r\x1b[K", end="", file=self.stderr, flush=True)

    def _say(self, line: str, event: dict[str, Any], end: str = "\n") -> None:
        if self.silent:
            return
        text = json.dumps(event) if self.as_json else line
        print(f"\r\x1b[K{text}" if self.live else text, end=end, file=self.stderr, flush=True)


def span(seconds: float) -> str:
    """A time for people: "42 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
