"""What generation tells on stderr: how far it is, how long it takes, what failed."""

from __future__ import annotations

import io
import json
import sys

import pytest

from engine.training import generate_progress
from engine.training.generate_progress import PREFIX, Progress, make_progress


class Clock:
    """In the place of time.monotonic."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(generate_progress.time, "monotonic", clock)
    return clock


def work(progress: Progress, clock: Clock, answers: int, failure: str | None = None) -> None:
    """So many answers of ten tokens, each of six seconds."""
    for number in range(answers):
        clock.now += 6.0
        progress.tokens(10)
        progress.answered(f"q{number}", failure)


def test_a_log_gets_a_line_now_and_then_with_the_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = make_progress("auto", 10, skipped=2)
    progress.start()
    work(progress, clock, 4)
    progress.summary()
    lines = [line.removeprefix(PREFIX) for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "10 prompts to answer, 2 are answered already",
        "2 of 10 · 1.7 tokens/s · 0:00:48 left",
        "4 of 10 · 1.7 tokens/s · 0:00:36 left",
        "4 answered, 0 failed, 2 were answered before, 6 left; 40 tokens in 0:00:24",
    ]


def test_a_terminal_gets_one_line_that_is_drawn_anew(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = make_progress("auto", 3, skipped=0)
    progress.start()
    work(progress, clock, 2)
    progress.summary()
    drawn = terminal.getvalue().split("\r\x1b[K")
    assert [part.count("\n") for part in drawn] == [1] + [0] * (len(drawn) - 2) + [1]
    assert f"{PREFIX}1 of 3 · 1.7 tokens/s · 0:00:24 left" in drawn


@pytest.mark.parametrize("mode", ["auto", "none"])
def test_failures_are_told_up_to_ten_and_cannot_order_the_terminal_about(
    clock: Clock, capsys: pytest.CaptureFixture[str], mode: generate_progress.ProgressMode
) -> None:
    progress = make_progress(mode, 20, skipped=0)
    work(progress, clock, 12, "too long \x1b[2J")
    told = [
        line for line in capsys.readouterr().err.splitlines() if "fail" in line or "not" in line
    ]
    shown = [line for line in told if "not answered" in line]
    assert len(shown) == 10
    assert shown[0] == f"{PREFIX}q0: not answered: too long \ufffd[2J"
    assert f"{PREFIX}further failures are only counted" in told


def test_json_lines_carry_the_figures(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = make_progress("json", 4, skipped=1)
    progress.start()
    work(progress, clock, 1)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["event"] for event in events] == ["note", "start", "answer"]
    assert events[1]["remaining_s"] is None
    assert events[2] == {
        "event": "answer", "id": "q0", "error": None, "done": 1, "failed": 0, "skipped": 1,
        "left": 3, "tokens": 10, "tokens_per_s": 1.67, "elapsed_s": 6.0, "remaining_s": 18.0,
    }  # fmt: skip
