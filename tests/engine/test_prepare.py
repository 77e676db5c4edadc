"""The model is brought here by `jupiter fetch` in a process of its own."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from engine import prepare
from engine.errors import CheckpointError, EngineError, ExitCode
from tests.engine.conftest import assert_gone


@pytest.fixture
def fetch_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a script in the place of `jupiter fetch`."""

    def write(script: str) -> None:
        (tmp_path / "stand_in.py").write_text(f"import os, subprocess, sys\n{script}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(prepare, "FETCH", ("stand_in",))

    return write


async def test_progress_is_passed_on_and_the_last_line_is_the_folder(fetch_is) -> None:
    fetch_is(
        "print('one', file=sys.stderr)\n"
        "print('10%\\r20%\\r30%', end='', file=sys.stderr)\n"
        "print('something else')\n"
        "print('/models/' + sys.argv[1])"
    )
    told: list[str] = []
    assert await prepare.fetch("org/model", told.append) == Path("/models/org/model")
    assert told == ["fetching org/model", "one", "10%", "20%", "30%"]


async def test_a_model_that_cannot_be_had_is_told_in_the_fetchs_own_line(fetch_is) -> None:
    fetch_is("print('jupiter fetch: org/model: no such model', file=sys.stderr)\nsys.exit(2)")
    with pytest.raises(CheckpointError, match=r"^org/model: no such model$"):
        await prepare.fetch("org/model", lambda line: None)


async def test_a_fetch_that_is_killed_is_told(fetch_is) -> None:
    fetch_is("os.kill(os.getpid(), 9)")
    with pytest.raises(EngineError, match="org/model: the fetch was killed by SIGKILL") as caught:
        await prepare.fetch("org/model", lambda line: None)
    assert caught.value.exit_code == ExitCode.ENGINE_FAILED


async def test_a_cancelled_fetch_leaves_no_process(fetch_is) -> None:
    fetch_is(
        "helper = subprocess.Popen(['sleep', '60'])\n"
        "print(os.getpid(), helper.pid, file=sys.stderr, flush=True)\n"
        "helper.wait()"
    )
    told: asyncio.Queue[str] = asyncio.Queue()
    task = asyncio.ensure_future(prepare.fetch("org/model", told.put_nowait))
    await told.get()
    pids = [int(pid) for pid in (await told.get()).split()]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_gone(pids, 1)
    assert all(pid != os.getpid() for pid in pids)
