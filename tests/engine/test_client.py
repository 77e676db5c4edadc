"""The client with fake workers: starting, asking, cancelling, stopping."""

from __future__ import annotations

import asyncio
import stat
import time
from pathlib import Path

import pytest

from engine.client import CLIENT_RANK, ClientState, EngineClient, StateChanged
from engine.errors import EngineError
from engine.protocol import (
    EventEnvelope,
    Failed,
    Finished,
    Message,
    Notice,
    StageState,
    Started,
    Tokens,
)
from tests.engine.conftest import FakeEngine, assert_gone, config_of


def notice_in(update: object) -> str:
    body = getattr(update, "body", None)
    return body.message if isinstance(body, Notice) else ""


async def test_an_answer_streams_as_started_tokens_finished(fake_engine) -> None:
    engine = fake_engine()
    ready = await engine.client.start()
    assert ready.stages == (1, 1)
    assert {rank: s.phase for rank, s in engine.client.stages.items()} == {0: "ready", 1: "ready"}
    answer = [event async for event in engine.client.submit(prompt="tokens 3")]
    assert isinstance(answer[0], Started)
    assert "".join(e.text for e in answer if isinstance(e, Tokens)) == "t0 t1 t2 "
    assert isinstance(answer[-1], Finished) and answer[-1].completion_tokens == 3


async def test_states_run_from_starting_over_busy_to_dead(fake_engine) -> None:
    engine = fake_engine()
    await engine.client.start()
    stream = engine.client.submit(messages=[Message("user", "tokens 1")])
    assert engine.client.state is ClientState.BUSY
    assert [event async for event in stream]
    assert engine.client.state is ClientState.READY
    await engine.client.stop()
    states = [u.state.value for u in engine.updates if isinstance(u, StateChanged)]
    assert states == ["ready", "busy", "ready", "draining", "dead"]


async def test_two_answers_at_once_keep_apart(fake_engine) -> None:
    engine = fake_engine()
    await engine.client.start()
    endless = engine.client.submit(prompt="endless")
    short = [event async for event in engine.client.submit(prompt="tokens 2")]
    assert {event.request_id for event in short} != {endless.request_id}
    assert engine.client.state is ClientState.BUSY
    engine.client.cancel(endless.request_id)
    rest = [event async for event in endless]
    assert {event.request_id for event in rest} == {endless.request_id}


async def test_a_cancelled_answer_keeps_its_text_and_finishes(fake_engine) -> None:
    engine = fake_engine()
    await engine.client.start()
    stream = engine.client.submit(prompt="endless")
    assert isinstance(await anext(stream), Started)
    assert isinstance(await anext(stream), Tokens)
    engine.client.cancel(stream.request_id)
    last = [event async for event in stream][-1]
    assert isinstance(last, Finished) and last.finish_reason == "cancelled"
    engine.client.cancel(stream.request_id)  # once more does nothing


async def test_a_failed_request_leaves_the_engine_ready(fake_engine) -> None:
    engine = fake_engine()
    await engine.client.start()
    (failed,) = [event async for event in engine.client.submit(prompt="fail")]
    assert isinstance(failed, Failed) and failed.code == "prompt_too_long"
    assert engine.client.state is ClientState.READY


async def test_unusable_frames_are_dropped_counted_and_told(fake_engine) -> None:
    engine = fake_engine()
    await engine.client.start()
    assert [event async for event in engine.client.submit(prompt="frames")]
    notice = await engine.seen(lambda u: "6 in all" in notice_in(u))
    assert notice.rank == CLIENT_RANK and "event frames dropped" in notice_in(notice)
    assert not engine.client.telemetry  # four of the six held some
    await engine.client.stop()
    assert engine.client.dropped_messages == 6


async def test_a_flood_of_events_loses_no_token(fake_engine) -> None:
    engine = fake_engine(world=1)
    await engine.client.start()
    answer = [event async for event in engine.client.submit(prompt="flood 5000")]
    ids = [event.token_ids[0] for event in answer if isinstance(event, Tokens)]
    assert ids == list(range(5000))


async def test_a_slow_start_that_reports_progress_outlasts_the_silence_limit(
    fake_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WORKER_0", "progress 11 0.4")
    engine = fake_engine(world=1, silence_s=3.0)
    began = time.monotonic()
    await engine.client.start()
    assert time.monotonic() - began > 4.0


async def test_a_start_in_which_nobody_speaks_fails(
    fake_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WORKER_0", "hang")
    engine = fake_engine(world=1, silence_s=1.0)
    with pytest.raises(EngineError, match="no stage has said anything for 1 s"):
        await engine.client.start()
    assert engine.client.state is ClientState.DEAD


async def test_stop_in_the_middle_of_a_start_ends_it(
    fake_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WORKER_0", "progress 1000 1")
    engine = fake_engine()
    start = asyncio.ensure_future(engine.client.start())
    await engine.seen(lambda u: isinstance(u, EventEnvelope) and isinstance(u.body, StageState))
    pids = engine.pids()
    await engine.client.stop()
    assert_gone(pids, 0)
    with pytest.raises(EngineError, match="stopped before it was ready"):
        await start


async def test_a_cancelled_start_leaves_nothing(
    fake_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WORKER_0", "progress 1000 1")
    engine = fake_engine()
    start = asyncio.ensure_future(engine.client.start())
    await engine.seen(lambda u: isinstance(u, EventEnvelope))
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert engine.client.state is ClientState.DEAD


async def test_stop_ends_workers_that_listen_to_nothing(fake_engine) -> None:
    engine = fake_engine()
    await engine.client.start()
    await anext(engine.client.submit(prompt="hang"))
    pids = engine.pids()
    assert len(pids) == 3
    began = time.monotonic()
    await engine.client.stop()
    assert time.monotonic() - began < 5.0
    assert_gone(pids, 0)
    await engine.client.stop()  # once more does nothing


async def test_stop_raises_in_open_requests_and_later_ones_are_refused(fake_engine) -> None:
    engine = fake_engine()
    await engine.client.start()
    stream = engine.client.submit(prompt="endless")
    await engine.client.stop()
    with pytest.raises(EngineError, match="stopped"):
        _ = [event async for event in stream]
    with pytest.raises(EngineError, match="stopped"):
        engine.client.submit(prompt="tokens 1")


async def test_kill_now_ends_all_without_the_loop(fake_engine) -> None:
    engine = fake_engine()
    await engine.client.start()
    await anext(engine.client.submit(prompt="hang"))
    pids = engine.pids()
    engine.client.kill_now()
    assert_gone(pids, 0)


async def test_a_dead_engine_can_be_started_again(fake_engine) -> None:
    engine = fake_engine(world=1)
    await engine.client.start()
    await engine.client.stop()
    await engine.client.start()
    assert ClientState.RESPAWNING in [u.state for u in engine.updates if hasattr(u, "state")]
    assert [event async for event in engine.client.submit(prompt="tokens 1")]


async def test_a_listener_that_raises_does_not_stop_the_engine(fake_engine) -> None:
    engine: FakeEngine = fake_engine(world=1)
    problems: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    engine.client._listener = lambda update: 1 / 0
    await engine.client.start()
    assert [event async for event in engine.client.submit(prompt="tokens 1")]
    assert all(isinstance(problem["exception"], ZeroDivisionError) for problem in problems)
    assert problems


async def test_what_a_launch_leaves_behind_is_private(fake_engine, run_base: Path) -> None:
    engine = fake_engine(world=1)
    await engine.client.start()
    (run_dir,) = run_base.iterdir()
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((run_dir / "run.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(engine.client.log_dir.stat().st_mode) == 0o700
    await engine.client.stop()
    assert not run_dir.exists() and engine.client.log_path(0) is not None


async def test_asking_too_early_or_for_two_things_is_refused() -> None:
    client = EngineClient(config_of(1))
    with pytest.raises(EngineError, match="starting"):
        client.submit(prompt="x")
    with pytest.raises(ValueError, match="either messages or prompt"):
        client.submit(prompt="x", messages=[])
