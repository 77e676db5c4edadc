"""A lost stage is replaced: when, how often, and what is noticed."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from engine.client import ClientState
from engine.continuity import AnswerStream
from engine.errors import EngineError
from engine.protocol import (
    Finished,
    Generate,
    Message,
    Metrics,
    StageTelemetry,
    Started,
    Tokens,
    Transcript,
)
from engine.recovery import STEADY_S, Attempts
from engine.watchdog import CHECK_S, Watchdog


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# --- how often -----------------------------------------------------------------------------------


def test_attempts_without_progress_wait_longer_and_end() -> None:
    attempts = Attempts(3)
    assert [attempts.next_delay() for _ in range(5)] == [0.0, 0.5, 1.0, None, None]


def test_a_token_and_a_long_time_in_service_are_progress() -> None:
    clock = Clock()
    attempts = Attempts(1, clock)
    for progress in (attempts.progressed, lambda: setattr(clock, "now", clock.now + STEADY_S)):
        attempts.up()
        progress()
        assert attempts.next_delay() == 0.0
    attempts.up()
    assert attempts.next_delay() is None


# --- what is noticed -----------------------------------------------------------------------------


class Stages:
    """Three stages as the watchdog hears them, twice a second."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.dog = Watchdog(3, self.clock)
        self.doing = ["wait", "busy", "idle"]
        self.progress = [0, 0, 0]
        self.silent: set[int] = set()

    def until_noticed(self, seconds: float, moves: bool = False) -> tuple[float, object]:
        """Let time pass; how long it took to notice something, and what, or None."""
        began = self.clock.now
        while self.clock.now - began < seconds:
            self.clock.now += CHECK_S
            self.progress[1] += moves
            for rank in {0, 1, 2} - self.silent:
                self.dog.heard(rank, telemetry(self.doing[rank], self.progress[rank]))
            if (hang := self.dog.check()) is not None:
                return self.clock.now - began, hang
        return self.clock.now - began, None


def telemetry(doing: str, progress: int, patience_s: float = 2.0) -> StageTelemetry:
    return StageTelemetry(
        layers=1, memory_bytes=1, memory_kind="process", busy_s=0, wait_s=0, steps=1, rows=1,
        doing=doing, progress=progress, patience_s=patience_s,  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_stage_that_says_nothing_is_noticed_within_three_seconds() -> None:
    stages = Stages()
    stages.silent = {2}
    seconds, hang = stages.until_noticed(10, moves=True)
    assert seconds < 3 and hang.rank == 2  # type: ignore[attr-defined]


def test_a_stage_that_computes_nothing_is_noticed_though_it_speaks() -> None:
    seconds, hang = Stages().until_noticed(10)
    assert seconds < 3 and hang.rank == 1  # type: ignore[attr-defined]


def test_where_all_wait_it_is_what_is_between_them() -> None:
    stages = Stages()
    stages.doing = ["wait", "wait", "wait"]
    seconds, hang = stages.until_noticed(10)
    assert seconds < 3 and hang.rank is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("doing", ["idle", "text"])
def test_no_work_and_a_long_text_are_no_hang(doing: str) -> None:
    stages = Stages()
    stages.doing[0] = doing
    assert stages.until_noticed(30)[1] is None


def test_a_long_prefill_is_no_hang_while_layers_are_computed() -> None:
    assert Stages().until_noticed(30, moves=True)[1] is None


def test_a_client_that_stood_still_itself_blames_nobody() -> None:
    stages = Stages()
    stages.until_noticed(1, moves=True)
    stages.clock.now += 60
    assert stages.dog.check() is None
    assert stages.until_noticed(5, moves=True)[1] is None


# --- an answer over two engines ------------------------------------------------------------------


async def test_what_a_lost_engine_gave_counts_and_is_not_asked_for_again() -> None:
    stream = AnswerStream(Generate(request_id="a", messages=(Message("user", "x"),)))
    assert stream.continuation().transcript_wanted
    known = Transcript("x", (7, 8))
    stream.part(Started(request_id="a", prompt_tokens=2, cached_tokens=0, transcript=known))
    for ids in ((1,), (2, 3), (4,)):
        stream.part(Tokens(request_id="a", token_ids=ids, text="t"))
    stream.lost()
    again = stream.continuation()
    assert again.answered == (1, 2, 3, 4) and again.answered_steps == 2
    assert again.transcript == known
    stream.part(Started(request_id="a", prompt_tokens=2, cached_tokens=0))
    stream.part(Tokens(request_id="a", token_ids=(5,), text="t"))
    metrics = Metrics(ttft_s=9.0, decode_steps=0)
    stream.part(
        Finished(
            request_id="a",
            finish_reason="stop",
            context_full=False,
            prompt_tokens=2,
            cached_tokens=2,
            completion_tokens=5,
            metrics=metrics,
            transcript=known,
        )
    )
    events = [event async for event in stream]
    assert [type(event) for event in events] == [Started, Tokens, Tokens, Tokens, Tokens, Finished]
    # Asked for by nobody but the client itself.
    assert events[0].transcript is None and events[-1].transcript is None
    done = events[-1].metrics
    assert done.decode_steps == 2 and done.ttft_s is not None and done.ttft_s < 9.0


# --- the client, with fake workers ---------------------------------------------------------------


async def test_an_engine_whose_torchrun_died_is_started_anew_and_goes_on(
    fake_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TELEMETRY", "0.2")
    engine = fake_engine(attempts=3)
    await engine.client.start()
    stream = engine.client.submit(prompt="endless")
    assert isinstance(await anext(stream), Started)
    first = await anext(stream)
    os.kill(engine.pids()[0], signal.SIGKILL)
    second = await anext(stream)  # of the new engine
    assert isinstance(first, Tokens) and isinstance(second, Tokens)
    assert engine.client.state is ClientState.BUSY
    engine.client.cancel(stream.request_id)
    assert isinstance([event async for event in stream][-1], Finished)
    states = [u.state for u in engine.updates if hasattr(u, "reason")]
    assert states.count(ClientState.RECOVERING) == 1


async def test_a_request_that_ends_every_engine_is_given_up_with_the_cause(
    fake_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.recovery.FIRST_DELAY_S", 0.01)
    monkeypatch.setenv("FAKE_TELEMETRY", "0.2")
    engine = fake_engine(attempts=2)
    await engine.client.start()
    stream = engine.client.submit(prompt="rank1 exit 7")
    with pytest.raises(EngineError, match=r"given up after 2 attempts.*rank 1.*exit code 7"):
        async with asyncio.timeout(30):
            _ = [event async for event in stream]
    assert engine.client.state is ClientState.DEAD


async def test_asking_and_cancelling_while_it_recovers(
    fake_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TELEMETRY", "0.2")
    engine = fake_engine(attempts=3)
    await engine.client.start()
    endless = engine.client.submit(prompt="endless")
    assert isinstance(await anext(endless), Started)
    assert isinstance(await anext(endless), Tokens)
    os.kill(engine.pids()[0], signal.SIGKILL)
    await engine.seen(lambda u: getattr(u, "state", None) is ClientState.RECOVERING)
    asked = engine.client.submit(prompt="tokens 2")
    engine.client.cancel(endless.request_id)
    last = [event async for event in endless][-1]
    assert isinstance(last, Finished) and last.finish_reason == "cancelled"
    assert "".join([e.text async for e in asked if isinstance(e, Tokens)]) == "t0 t1 "
