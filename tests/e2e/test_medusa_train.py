"""`jupiter medusa` as it is shipped: real torchrun, tiny models."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engine.processes import ProcessHandle, wait_all_gone
from engine.training.checkpoint import find
from tests.engine.training.ranks import steps
from tests.tiny import tiny_folder

COMMAND = str(Path(sys.executable).with_name("jupiter"))
DEADLINE_S = 10.0


class Training:
    """Runs of the command in one folder; what they start ends with the test."""

    def __init__(self, folder: Path, runtime: Path) -> None:
        self.folder, self.runtime = folder, runtime
        rows = [
            {"query": "ask" * (n % 3 + 1), "response": "abcdefgh"[: 2 + n % 6]} for n in range(12)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *words: str, ranks: int = 2, **environment: str) -> subprocess.Popen[str]:
        # fmt: off
        common = [
            "--model", str(tiny_folder(layers=3)), "--dataset", "rows.jsonl", "--save", "runs",
            "--global_batch_size", "4", "--medusa_num_heads", "2", "--eval_iters", "0",
            "--split_dataset_ratio", "0", "--log_interval", "1",
        ]
        # fmt: on
        process = subprocess.Popen(
            [COMMAND, "medusa", *common, *words],
            cwd=self.folder,
            env={
                **os.environ,
                "NPROC_PER_NODE": str(ranks),
                "OMP_NUM_THREADS": "1",
                "XDG_RUNTIME_DIR": str(self.runtime),
                **environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def endless(self, *words: str) -> tuple[subprocess.Popen[str], list[ProcessHandle]]:
        """A run that has done a step and would go on for hours, and its ranks."""
        process = self.start("--train_iters", "1000000", *words)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step "):
                break
        children = psutil.Process(process.pid).children(recursive=True)
        return process, [ProcessHandle(child.pid) for child in children]

    def run_folder(self, version: int = 0) -> Path:
        (folder,) = (self.folder / "runs").glob(f"v{version}-*")
        return folder


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    with tempfile.TemporaryDirectory(prefix="t-") as runtime:
        training = Training(tmp_path, Path(runtime))
        yield training
        for process in training.started:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
            process.communicate()


def test_ranks_train_together_and_the_run_folder_is_the_last_line(training: Training) -> None:
    process = training.start("--train_iters", "3", "--pipeline_model_parallel_size", "2")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    run = training.run_folder()
    assert out.splitlines()[-1] == str(run)
    assert [step["iteration"] for step in steps(run)] == [1, 2, 3]
    files = {path.name for path in find(run).glob("*.distcp")}
    assert files == {"__0_0.distcp", "__1_0.distcp"}
    assert not list(training.runtime.iterdir())
    # Nothing but the run's own words.
    assert all(line.startswith(("step ", "saved ", "heads are in ")) for line in err.splitlines())


def test_machines_train_together(training: Training) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nodes = [
        training.start(
            *("--train_iters", "2"),
            ranks=1,
            NNODES="2",
            NODE_RANK=str(node),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for node in range(2)
    ]
    outputs = [node.communicate(timeout=60) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    run = training.run_folder()
    assert [out.splitlines()[-1:] for out, _ in outputs] == [[str(run)], []]
    assert {file.name[:4] for file in find(run).glob("*.distcp")} == {"__0_", "__1_"}


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl+C", "SIGTERM"]
)
def test_a_signal_saves_a_checkpoint_and_leaves_no_process(
    number: signal.Signals, code: int, training: Training
) -> None:
    process, ranks = training.endless()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert wait_all_gone(ranks, DEADLINE_S)
    saved = find(training.run_folder())
    assert f"saved {saved}" in err
    at = int(saved.name.removeprefix("iter_"))
    assert at == steps(training.run_folder())[-1]["iteration"]
    # One rank alone can go on with it.
    more = training.start("--load", str(saved), "--train_iters", str(at + 1), ranks=1)
    _, err = more.communicate(timeout=60)
    assert more.returncode == 0, err
    assert [step["iteration"] for step in steps(training.run_folder(1))] == [at + 1]


def test_a_bad_row_is_told_once(training: Training) -> None:
    (training.folder / "rows.jsonl").write_text('{"query": "a", "response": "b"}\n{"what": 1}\n')
    process = training.start("--train_iters", "3")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = err.splitlines()
    assert line.startswith("jupiter medusa: ")
    assert "rows.jsonl: line 2" in line
    assert out == ""


def test_a_dead_rank_ends_the_run_with_its_name(training: Training) -> None:
    process, ranks = training.endless()
    ranks[1].signal(signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert err.splitlines()[-1].endswith("was killed by SIGKILL (out of memory, or by hand)")
    assert "Traceback" not in err
    assert wait_all_gone(ranks, DEADLINE_S)


def test_no_rank_outlives_the_command(training: Training) -> None:
    process, ranks = training.endless()
    process.kill()
    process.wait()
    assert wait_all_gone(ranks, DEADLINE_S)
    assert list(training.runtime.iterdir())
    # The next run sweeps up after it.
    training.start("--train_iters", "1").communicate(timeout=60)
    assert not list(training.runtime.iterdir())
