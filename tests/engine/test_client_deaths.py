"""Whoever dies, the others end too, and whoever is left is told what happened."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.client import ClientState, EventEnvelope
from engine.errors import EngineError, ExitCode
from engine.launch import Launch, torchrun_command
from engine.run_dir import RunDir
from tests import client_process, fake_worker
from tests.engine.conftest import FakeEngine, assert_gone


async def death_of(engine: FakeEngine, script: str) -> EngineError:
    """The error of a request whose script ends the engine; nothing is left afterwards."""
    await engine.client.start()
    waiting = engine.client.submit(prompt="endless")
    pids = engine.pids()
    stream = engine.client.submit(prompt=script)
    return await error_in(engine, [stream, waiting], pids)


async def error_in(engine: FakeEngine, streams: list, pids: list[int]) -> EngineError:
    errors = []
    async with asyncio.timeout(5):
        for stream in streams:
            with pytest.raises(EngineError) as caught:
                _ = [event async for event in stream]
            errors.append(caught.value)
    assert_gone(pids, 0)
    assert engine.client.state is ClientState.DEAD
    assert len({str(error) for error in errors}) == 1
    with pytest.raises(EngineError, match=str(errors[0]).split("\n")[0].split("(")[0]):
        engine.client.submit(prompt="tokens 1")
    return errors[0]


async def test_a_worker_that_exits_is_told_with_rank_code_and_last_lines(fake_engine) -> None:
    error = await death_of(fake_engine(), "rank1 exit 7")
    first, *lines = str(error).splitlines()
    assert first.startswith("rank 1 (process ") and "ended with exit code 7" in first
    assert [line.strip() for line in lines] == [f"line {n} of rank 1" for n in range(10, 20)]
    assert error.exit_code == ExitCode.ENGINE_FAILED


async def test_a_killed_worker_is_told_with_its_signal(fake_engine) -> None:
    error = await death_of(fake_engine(world=3), "rank2 kill")
    assert "rank 2" in str(error) and "killed by SIGKILL" in str(error)


async def test_a_workers_last_words_are_the_message(fake_engine) -> None:
    error = await death_of(fake_engine(), "rank1 error 2 heads.pt: width 3, not 4")
    assert str(error) == "heads.pt: width 3, not 4"
    assert error.exit_code == ExitCode.BAD_INPUT


async def test_a_failure_inside_a_worker_names_rank_code_and_log(fake_engine) -> None:
    error = await death_of(fake_engine(), "rank1 error 3 RuntimeError: boom")
    assert "rank 1: RuntimeError: boom (exit code 3; log: " in str(error)
    assert error.exit_code == ExitCode.ENGINE_FAILED


async def test_a_worker_that_leaves_unasked_with_code_0_ends_the_engine(
    fake_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torchrun sees nothing wrong in it and will never say a word.
    monkeypatch.setattr("engine.client.DEATH_VERDICT_S", 0.3)
    error = await death_of(fake_engine(), "rank1 exit 0")
    assert "rank 1" in str(error) and "ended" in str(error)


async def test_killing_torchrun_ends_the_workers_and_is_told(fake_engine) -> None:
    engine = fake_engine()
    await engine.client.start()
    pids = engine.pids()
    stream = engine.client.submit(prompt="endless")
    os.kill(pids[0], signal.SIGKILL)
    error = await error_in(engine, [stream], pids)
    assert "torchrun was killed by SIGKILL" in str(error)


async def test_a_worker_that_dies_in_the_start_is_told(
    fake_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WORKER", "rank1 exit 9")  # before it has said anything
    engine = fake_engine()
    with pytest.raises(EngineError, match=r"rank 1 \(process \d+\) ended with exit code 9"):
        await engine.client.start()
    assert engine.client.state is ClientState.DEAD


async def test_a_worker_that_refuses_the_model_in_the_start_is_told(
    fake_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WORKER_0", "error 2 model.safetensors: truncated")
    with pytest.raises(EngineError, match=r"^model.safetensors: truncated$") as caught:
        await fake_engine().client.start()
    assert caught.value.exit_code == ExitCode.BAD_INPUT


async def test_a_stop_while_dying_waits_for_the_same_end(fake_engine) -> None:
    engine = fake_engine()
    await engine.client.start()
    pids = engine.pids()
    os.kill(pids[1], signal.SIGKILL)
    await engine.seen(lambda u: getattr(u, "state", None) is ClientState.DRAINING)
    await engine.client.stop()
    assert_gone(pids, 0)
    assert engine.client.state is ClientState.DEAD


# --- the client itself dies ----------------------------------------------------------------------


def child_client(tmp_path: Path) -> subprocess.Popen[str]:
    config = tmp_path / "config.json"
    config.write_text('{"base_model_name_or_path": "x", "stage_num_hidden_layers_list": [1, 1]}')
    root = Path(client_process.__file__).parent.parent
    return subprocess.Popen(
        [sys.executable, client_process.__file__, str(config), "fake"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def test_no_worker_outlives_a_client_killed_with_kill_9(run_base: Path, tmp_path: Path) -> None:
    with child_client(tmp_path) as client:
        assert client.stdout is not None
        pids = json.loads(client.stdout.readline())["pids"]
        assert len(pids) == 3
        client.kill()
        began = time.monotonic()
        assert_gone(pids)
        assert time.monotonic() - began < 5.0
    (left,) = run_base.iterdir()  # nobody was there to remove it; the next launch does
    RunDir().remove()
    assert not left.exists()


def test_a_client_ended_by_an_exception_or_ctrl_c_leaves_nothing(
    run_base: Path, tmp_path: Path
) -> None:
    with child_client(tmp_path) as client:
        assert client.stdout is not None
        pids = json.loads(client.stdout.readline())["pids"]
        client.send_signal(signal.SIGINT)
        client.wait(5)
        assert_gone(pids, 0)
    assert not list(run_base.iterdir())


# --- the real torchrun ---------------------------------------------------------------------------


def torchrun_of_fakes(launch: Launch) -> list[str]:
    return torchrun_command(launch, worker=Path(fake_worker.__file__))


async def test_the_real_torchrun_reports_the_rank_that_died_first(
    fake_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It ends the other worker before it writes how this one ended: long, beside other tests.
    monkeypatch.setattr("engine.client.DEATH_VERDICT_S", 20.0)
    engine = fake_engine()
    engine.client._command = torchrun_of_fakes
    await engine.client.start()
    assert engine.client.log_path(1) is not None
    stream = engine.client.submit(prompt="rank1 exit 7")
    error = await error_in(engine, [stream], engine.pids())
    assert "rank 1 (process " in str(error) and "ended with exit code 7" in str(error)
    assert "line 19 of rank 1" in str(error)


async def test_the_real_torchrun_stops_in_order_and_fast(fake_engine) -> None:
    engine = fake_engine()
    engine.client._command = torchrun_of_fakes
    await engine.client.start()
    pids = engine.pids()
    assert [event async for event in engine.client.submit(prompt="tokens 1")]
    began = time.monotonic()
    await engine.client.stop()
    assert time.monotonic() - began < 5
    assert_gone(pids, 0)
    # By Shutdown, not by a signal.
    assert {state.phase for state in engine.client.stages.values()} == {"stopped"}


async def test_the_real_torchrun_killed_while_it_starts_leaves_nothing(
    fake_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WORKER_0", "progress 1000 1")
    engine = fake_engine()
    engine.client._command = torchrun_of_fakes
    start = asyncio.ensure_future(engine.client.start())
    await engine.seen(lambda u: isinstance(u, EventEnvelope))
    pids = engine.pids()
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(EngineError, match="torchrun was killed by SIGKILL"):
        await start
    assert_gone(pids, 0)
