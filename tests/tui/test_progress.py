"""What a batch says on stderr, and that it never stops the work."""

from __future__ import annotations

import io
import json

import pytest

from engine.protocol import PROTOCOL_VERSION, EventEnvelope, StageState
from tui import progress
from tui.batch_input import parse_requests
from tui.progress import (
    JsonReporter,
    LiveReporter,
    PlainReporter,
    Reporter,
    Tally,
    make_reporter,
)

(REQUEST,) = parse_requests("in", b'{"prompt": "a"}')


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """stderr as a terminal; called in the test, since pytest takes stderr back before it."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    return terminal


def loading(done: int, rank: int = 0) -> EventEnvelope:
    state = StageState(phase="loading", done=done, total=10)
    return EventEnvelope(PROTOCOL_VERSION, 1, rank, state)


def run_through(reporter: Reporter) -> None:
    """A whole run: a failed line and one that is done."""
    reporter.engine(loading(5))
    tally = Tally(todo=2)
    reporter.start(tally)
    tally.failed = 1
    reporter.line(tally, REQUEST, "too long")
    tally.streamed = 7
    reporter.tokens(tally)
    tally.done, tally.tokens = 1, 7
    reporter.line(tally, REQUEST, None)
    stopped = StageState(phase="stopped")
    reporter.engine(EventEnvelope(PROTOCOL_VERSION, 1, 0, stopped))
    reporter.summary(tally)
    reporter.close()


def test_a_bar_is_shown_only_where_it_is_alone_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_terminal(monkeypatch)
    assert type(make_reporter("auto", answers_on_terminal=False)) is LiveReporter
    assert type(make_reporter("auto", answers_on_terminal=True)) is PlainReporter
    monkeypatch.setenv("TERM", "dumb")
    assert type(make_reporter("auto", answers_on_terminal=False)) is PlainReporter
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert type(make_reporter("auto", answers_on_terminal=False)) is PlainReporter


def test_the_bar_goes_away_and_leaves_the_cursor_and_the_summary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = on_terminal(monkeypatch)
    run_through(LiveReporter())
    text = terminal.getvalue()
    before, _, after = text.partition("batch ")
    assert "starting" in before
    assert after
    assert "loading" not in after
    assert "line 1 (line-1) failed: too long" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    last = text.splitlines()[-1]
    assert "jupiter-tui: 1 done, 1 failed, 0 skipped; 7 tokens in" in last


def test_plain_lines_come_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    reporter, tally = PlainReporter(), Tally(todo=100, began=clock.now)
    for _ in range(50):
        clock.now += 0.5
        tally.done += 1
        tally.tokens += 10
        reporter.line(tally, REQUEST, None)
    assert capsys.readouterr().err.splitlines() == [
        "jupiter-tui: 20 of 100 · 0 failed · 20.0 tokens/s",
        "jupiter-tui: 40 of 100 · 0 failed · 20.0 tokens/s",
    ]


def test_many_failures_are_only_counted(capsys: pytest.CaptureFixture[str]) -> None:
    reporter, tally = PlainReporter(), Tally(todo=100)
    for _ in range(50):
        tally.failed += 1
        reporter.line(tally, REQUEST, "no")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert "only counted" in lines[-1]


def test_json_tells_a_phase_once_and_then_how_far_it_is(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = JsonReporter()
    for done in range(8):
        reporter.engine(loading(done))
        clock.now += 0.3
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["done"] for event in events] == [0, 4]


def test_control_characters_of_others_are_made_harmless(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Reporter().error("a log line\x1b[2J")
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("stderr", [None, Closed()], ids=["closed", "broken pipe"])
def test_a_stderr_that_nobody_reads_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, stderr: object
) -> None:
    monkeypatch.setattr("sys.stderr", stderr)
    run_through(PlainReporter())
    run_through(JsonReporter())
