"""The course of a run, from the queue and from its log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.protocol import TrainingStep
from tui.training_history import MOST_POINTS, History, Tail


def step(iteration: int, loss: float = 2.0, **extra: Any) -> TrainingStep:
    values: dict[str, Any] = {
        "iteration": iteration, "total": 10, "loss": loss, "loss_per_head": (loss, loss + 1),
        "accuracy_per_head": (0.5, 0.25), "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 100.0,
        "memory_bytes": 1 << 30, "memory_kind": "process", "elapsed_s": 1.0, "remaining_s": 9.0,
    }  # fmt: skip
    return TrainingStep(**{**values, **extra})


def record(iteration: int, loss: float = 3.0) -> str:
    return json.dumps(
        {
            "iteration": iteration,
            "train_iters": 10,
            "loss": loss,
            "loss_per_head": [loss, loss],
            "accuracy_per_head": [0.1, 0.1],
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_s": 5.0,
            "memory_bytes": 7,
            "elapsed_s": 3.0,
            "remaining_s": 4.0,
        }
    )


def test_steps_of_the_queue_go_before_lines_of_the_log() -> None:
    history = History()
    history.add_step(step(1))
    history.add_line(record(1))
    history.add_line(record(2))  # the file was faster than the queue
    history.add_step(step(2, loss=1.5))
    assert [(p.iteration, p.loss_per_head[0]) for p in history.points] == [(1, 2.0), (2, 1.5)]
    assert (history.iteration, history.total, history.remaining_s) == (2, 10, 9.0)


def test_a_run_that_was_not_watched_is_read_from_its_log() -> None:
    history = History()
    for iteration in (5, 10):
        history.add_line(record(iteration))
    evaluation = {
        "iteration": 10, "eval_loss": 1.0, "eval_loss_per_head": [1.0, 2.0],
        "eval_accuracy_per_head": [0.6, 0.4], "eval_dropped_targets": 0,
    }  # fmt: skip
    history.add_line(json.dumps(evaluation))
    assert [point.iteration for point in history.points] == [5, 10]
    assert history.evaluations[-1].accuracy_per_head == (0.6, 0.4)
    assert history.elapsed_s == 3.0


def test_a_line_that_no_run_writes_is_counted_and_left_out() -> None:
    history = History()
    for line in ("{", "[]", '{"iteration": "one"}'):
        history.add_line(line)
    assert (history.points, history.unreadable) == ([], 3)


def test_a_long_run_keeps_its_beginning_and_its_end() -> None:
    history = History()
    for iteration in range(1, MOST_POINTS * 3):
        history.add_step(step(iteration))
    assert len(history.points) <= MOST_POINTS
    assert history.points[0].iteration == 1
    assert history.points[-1].iteration == MOST_POINTS * 3 - 1


def test_a_file_is_read_line_by_line_as_it_grows(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "log")
    assert tail.new_lines() == []
    (tmp_path / "log").write_text("one\ntw")
    assert tail.new_lines() == ["one"]
    with (tmp_path / "log").open("a") as file:
        file.write("o\n\nthree\n")
    assert tail.new_lines() == ["two", "", "three"]
    assert tail.new_lines() == []
