"""Engines whose workers are fakes, each in folders of its own, none of which outlives its test."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from engine.client import EngineClient, Update
from engine.config import JupiterConfig, parse_config
from engine.launch import Launch
from engine.processes import ProcessHandle, wait_all_gone
from tests import fake_worker

# Within so many seconds every process has to be gone.
DEADLINE_S = 5.0
# How long a test waits for what has to come, on however busy a machine.
PATIENCE_S = 60.0


@pytest.fixture
def run_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder for run folders, its path short enough for sockets."""
    base = Path(tempfile.mkdtemp(prefix="t-"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "state"))
    yield base
    shutil.rmtree(base)


class FakeEngine:
    """A client of fake workers, and what it told its listener."""

    def __init__(self, world: int, silence_s: float, attempts: int) -> None:
        self.updates: list[Update] = []
        self.client = EngineClient(
            config_of(world),
            listener=self._note,
            silence_s=silence_s,
            command=fake_agent_command,
            attempts=attempts,
        )
        self._noted = asyncio.Event()

    def _note(self, update: Update) -> None:
        self.updates.append(update)
        self._noted.set()

    async def seen(self, test: Callable[[Update], bool]) -> Update:
        """The first update for which `test` holds, those of before included."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for update in self.updates:
                    if test(update):
                        return update
                self._noted.clear()
                await self._noted.wait()

    def pids(self) -> list[int]:
        """torchrun's stand-in and all below it."""
        assert self.client._crew is not None
        launch = self.client._crew.launch
        assert launch.process is not None
        return tree_of(launch.process.pid)


def config_of(world: int) -> JupiterConfig:
    return parse_config(
        {"base_model_name_or_path": "fake", "stage_num_hidden_layers_list": [1] * world}, "a test"
    )


def fake_agent_command(launch: Launch) -> list[str]:
    words = ["--agent", launch.config.world_size, launch.log_dir, launch.run_dir.path]
    return [sys.executable, fake_worker.__file__, *map(str, words)]


def tree_of(pid: int) -> list[int]:
    root = psutil.Process(pid)
    return [pid, *(child.pid for child in root.children(recursive=True))]


def assert_gone(pids: list[int], seconds: float = DEADLINE_S) -> None:
    """No process of `pids` runs any more, at the latest after `seconds`."""
    handles = []
    for pid in pids:
        with suppress(ProcessLookupError):
            handles.append(ProcessHandle(pid))
    gone = wait_all_gone(handles, seconds)
    for handle in handles:
        handle.signal(signal.SIGKILL)
        handle.close()
    assert gone


@pytest.fixture
async def fake_engine(
    run_base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[Callable[..., FakeEngine]]:
    """Makes engines of fake workers; afterwards nothing of them may be left."""

    async def no_model(config: JupiterConfig, on_message: Callable[[str], None]) -> Path:
        return tmp_path

    monkeypatch.setattr("engine.client.prepare_model", no_model)
    made: list[FakeEngine] = []

    def make(world: int = 2, silence_s: float = 30.0, attempts: int = 0) -> FakeEngine:
        made.append(FakeEngine(world, silence_s, attempts))
        return made[-1]

    yield make
    for engine in made:
        await engine.client.stop()
    assert not list(run_base.iterdir())
    assert not [t.name for t in threading.enumerate() if t.name.startswith("jupiter")]
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert not psutil.Process().children(recursive=True)
