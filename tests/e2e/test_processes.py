"""`kill -9` on each process of a running batch, in turn; and what a run listens on.

Without the client all end; without any other the batch goes on.

The shipped command with live workers on a tiny random model, its requests fed through a pipe.
"""

from __future__ import annotations

import ipaddress
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from engine.errors import ExitCode
from engine.processes import ProcessHandle, wait_all_gone
from tests.tiny import tiny_folder

GONE_S = 5.0
RECOVERY_S = 60.0
RANK = "jupiter-rank-"  # how the processes of a rank are called
# Far more than a test takes, so that the kill comes in the middle.
LINES = 5000
COMMAND = Path(sys.executable).with_name("jupiter-tui")


class Run:
    """A batch under way: at least one answer has come, and far from all."""

    def __init__(self, folder: Path) -> None:
        config = {
            "base_model_name_or_path": str(tiny_folder(layers=4)),
            "stage_num_hidden_layers_list": [2, 2],
            "sampling": "greedy",
            "num_threads": 1,
        }
        (folder / "config.json").write_text(json.dumps(config))
        words = [COMMAND, "--config", folder / "config.json", "--batch", "-", "--progress", "none"]
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in close())
        self.process = subprocess.Popen(
            list(map(str, words)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20}
        for number in range(LINES):
            line = {"custom_id": str(number), "body": request}
            line |= {"method": "POST", "url": "/v1/chat/completions"}
            self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.close()
        first = self.process.stdout.readline()
        assert first, self.told()
        assert json.loads(first)["response"]["status_code"] == 200
        # Go on reading: a full pipe would stop the batch.
        self.answers = 1
        self.came = threading.Condition()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        self.tree = psutil.Process(self.process.pid).children(recursive=True)
        self.handles = [ProcessHandle(pid) for pid in (self.process.pid, *self.pids())]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            assert json.loads(line)  # also at the end, a line is whole
            with self.came:
                self.answers += 1
                self.came.notify()

    def pids(self) -> list[int]:
        return [process.pid for process in self.tree]

    def torchrun(self) -> psutil.Process:
        (found,) = (
            process
            for process in self.tree
            if "torch.distributed.run" in process.cmdline() and RANK not in process.name()
        )
        return found

    def workers(self) -> dict[int, psutil.Process]:
        """The stages by rank; each is a fork of a process that torchrun has started."""
        return {
            int(process.name().removeprefix(RANK)): process
            for process in self.tree
            if process.name().startswith(RANK) and process.ppid() != self.torchrun().pid
        }

    def survives(self, pid: int) -> None:
        """End one process by SIGKILL; answers go on coming."""
        psutil.Process(pid).send_signal(signal.SIGKILL)
        with self.came:
            # More than could have been under way.
            enough = self.answers + 200
            assert self.came.wait_for(lambda: self.answers >= enough, RECOVERY_S)

    def terminate(self) -> None:
        """End the run; nothing of it is left."""
        tree = psutil.Process(self.process.pid).children(recursive=True)
        handles = self.handles + [ProcessHandle(process.pid) for process in tree]
        self.process.terminate()
        assert wait_all_gone(handles, GONE_S)
        assert self.process.wait() == ExitCode.TERMINATED

    def told(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read()

    def close(self) -> None:
        for handle in self.handles:
            handle.signal(signal.SIGKILL)
            handle.close()
        self.process.wait()
        self.reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.stderr.close()


@pytest.fixture
def run_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder for run folders, its path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="t-") as base:
        monkeypatch.setenv("XDG_RUNTIME_DIR", base)
        monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "state"))
        yield Path(base)


@pytest.fixture
def run(run_base: Path, tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    run.close()
    assert run.answers < LINES  # else nothing was interrupted


def test_when_the_client_is_killed_nothing_outlives_it(run: Run) -> None:
    assert sorted(run.workers()) == [0, 1]
    psutil.Process(run.process.pid).send_signal(signal.SIGKILL)
    assert wait_all_gone(run.handles, GONE_S)


def test_when_torchrun_is_killed_all_is_started_anew(run: Run, run_base: Path) -> None:
    run.survives(run.torchrun().pid)
    run.terminate()
    assert "torchrun was killed by SIGKILL" in run.told()
    assert "Traceback" not in run.told()
    assert not list(run_base.iterdir())


def test_when_a_worker_is_killed_another_takes_its_place(run: Run, run_base: Path) -> None:
    pid = run.workers()[1].pid
    run.survives(pid)
    run.terminate()
    assert f"rank 1 (process {pid}) was killed by SIGKILL" in run.told()
    assert "Traceback" not in run.told()
    assert not list(run_base.iterdir())


def readable_by_others(folder: Path) -> list[Path]:
    """Files and sockets below `folder` that somebody else could open."""
    if not folder.stat().st_mode & 0o077:
        return []
    found = []
    for path in folder.iterdir():
        if path.is_dir():
            found += readable_by_others(path)
        elif path.lstat().st_mode & 0o077:
            found.append(path)
    return found


def test_a_run_is_private_stays_on_loopback_and_leaves_nothing_when_terminated(
    run: Run, run_base: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    assert list(state.rglob("*.log")) and list(run_base.rglob("commands"))
    assert readable_by_others(state) == readable_by_others(run_base) == []
    addresses = set()
    for process in (psutil.Process(run.process.pid), *run.tree):
        with suppress(psutil.NoSuchProcess):
            addresses |= {link.laddr.ip for link in process.net_connections("inet")}
    assert addresses  # the stages' own links are seen
    assert all(ipaddress.ip_address(address).is_loopback for address in addresses), addresses
    run.terminate()
    assert not list(run_base.iterdir())
