"""Run folders, logs, environments: what a launch is made of."""

from __future__ import annotations

import itertools
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from engine import worker
from engine.config import config_json, parse_config
from engine.errors import EngineError
from engine.launch import Launch, torchrun_command, worker_environment
from engine.logs import KEEP_LAUNCHES, describe_exit, exit_codes, new_log_dir, tail, torchrun_log
from engine.post_mortem import PostMortem
from engine.run_dir import MAX_SOCKET_PATH, RunDir
from tests.engine.conftest import config_of

# In torchrun's words; ranks 1 and 0 failed, in this order.
TORCHRUN_LOG = """\
W1122 11:00:00 1 api.py:1010] Sending process 101 closing signal SIGTERM
E1122 11:00:00 1 api.py:984] failed (exitcode: -9) local_rank: 1 (pid: 102) of binary: /bin/python
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
Failures:
[1]:
  time      : 2026-11-22_11:00:00
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 101)
  error_file: <N/A>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_11:00:00
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 102)
  error_file: <N/A>
============================================================
"""


# --- run folders ---------------------------------------------------------------------------------


def test_a_run_folder_is_private_and_goes_away(run_base: Path) -> None:
    run_dir = RunDir()
    assert run_dir.path.parent == run_base
    assert stat.S_IMODE(run_dir.path.stat().st_mode) == 0o700
    assert len(os.fsencode(run_dir.commands.removeprefix("ipc://"))) <= MAX_SOCKET_PATH
    run_dir.remove()
    run_dir.remove()
    assert not list(run_base.iterdir())


def test_a_run_folder_of_a_live_client_is_left_and_of_a_dead_one_removed(run_base: Path) -> None:
    mine = RunDir()
    leave_one = "from engine.run_dir import RunDir; print(RunDir().path)"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", leave_one],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    left = Path(done.stdout.strip())
    assert left.parent == run_base and left.is_dir()
    other = RunDir()
    assert not left.exists() and mine.path.is_dir()
    mine.remove()
    other.remove()


def test_a_runtime_folder_whose_path_is_too_long_is_passed_over(
    run_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = run_base / ("x" * 90)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    monkeypatch.setattr("tempfile.tempdir", str(run_base))
    run_dir = RunDir()
    assert run_dir.path.parent == run_base
    run_dir.remove()


# --- logs ----------------------------------------------------------------------------------------


def test_only_the_last_launches_logs_are_kept(run_base: Path, tmp_path: Path) -> None:
    logs = tmp_path / "state" / "logs"
    for day in range(KEEP_LAUNCHES + 5):
        (logs / f"20200101-0000{day:02}.000-1").mkdir(parents=True)
    newest = new_log_dir()
    kept = sorted(logs.iterdir())
    assert len(kept) == KEEP_LAUNCHES and kept[-1] == newest
    assert kept[0].name == "20200101-000006.000-1"


def test_a_state_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "file"))
    with pytest.raises(EngineError, match="set JUPITER_STATE_DIR"):
        new_log_dir()


def test_the_tail_of_a_log_is_its_last_lines_of_text(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 100_000 + b"\nbad \xff byte\n\nlast  \n\n")
    assert tail(log, 2) == ["bad \ufffd byte", "last"]
    assert tail(tmp_path / "none") == [] and tail(None) == []


def test_torchruns_log_tells_how_workers_ended_the_cause_first(tmp_path: Path) -> None:
    torchrun_log(tmp_path).write_text(TORCHRUN_LOG)
    assert list(exit_codes(tmp_path).items()) == [(1, (102, -9)), (0, (101, -15))]
    assert describe_exit(-15) == "was killed by SIGTERM"
    assert describe_exit(3) == "ended with exit code 3"


# --- why it died ---------------------------------------------------------------------------------


def test_a_rank_that_torchrun_stopped_for_another_is_not_the_cause(tmp_path: Path) -> None:
    torchrun_log(tmp_path).write_text(TORCHRUN_LOG)
    post_mortem = PostMortem(tmp_path)
    post_mortem.reported(0, 101)  # rank 1 died before it could report
    post_mortem.gone(101)
    assert "rank 1 (process 102) was killed by SIGKILL" in str(post_mortem.error(1))


def test_the_rank_seen_to_go_first_is_the_cause(tmp_path: Path) -> None:
    torchrun_log(tmp_path).write_text(TORCHRUN_LOG)
    post_mortem = PostMortem(tmp_path)
    post_mortem.reported(0, 101)
    post_mortem.reported(1, 102)
    post_mortem.gone(102)
    post_mortem.gone(101)
    assert str(post_mortem.error(None)).startswith("rank 1 (process 102) was killed by SIGKILL")


def test_torchrun_told_to_stop_from_outside_is_said_so(tmp_path: Path) -> None:
    torchrun_log(tmp_path).write_text(
        "torch.distributed.elastic.multiprocessing.api.SignalException: "
        "Process 100 got signal: 15\n"
    )
    post_mortem = PostMortem(tmp_path)
    post_mortem.reported(0, 101)
    post_mortem.gone(101)
    assert str(post_mortem.error(1)) == "torchrun was told to stop by SIGTERM"


def test_torchrun_that_fails_by_itself_is_told_with_its_last_lines(tmp_path: Path) -> None:
    torchrun_log(tmp_path).write_text("No module named torch\n")
    post_mortem = PostMortem(tmp_path)
    post_mortem.gone(100)
    message = str(post_mortem.error(1))
    assert message.startswith("torchrun ended with exit code 1; the end of ")
    assert message.endswith("\n  No module named torch")


# --- the start -----------------------------------------------------------------------------------


@pytest.fixture
def launch(run_base: Path, tmp_path: Path):
    launch = Launch(config_of(3), tmp_path, epoch=5)
    yield launch
    launch.kill_now()


def test_torchrun_starts_one_worker_per_stage_and_opens_no_port(launch: Launch) -> None:
    words = torchrun_command(launch)
    options = dict(itertools.pairwise(words))
    assert options["--nproc-per-node"] == "3" and options["--max-restarts"] == "0"
    assert options["--rdzv-conf"] == "store_type=file"
    assert Path(options["--rdzv-endpoint"]).parent == launch.run_dir.path
    assert options["--start-method"] == "fork"
    assert words[-3:] == ["--run-path", worker.__file__, str(launch.run_dir.path)]


def test_workers_are_told_what_they_need(launch: Launch, tmp_path: Path) -> None:
    launch._command = lambda _: ["true"]
    launch.spawn()
    assert stat.S_IMODE(launch.run_dir.run_file.stat().st_mode) == 0o600
    run = json.loads(launch.run_dir.run_file.read_text())
    config = parse_config(run.pop("config"), "run.json")
    assert config_json(config) == config_json(launch.config)
    assert run == {
        "epoch": 5,
        "events": launch.run_dir.events,
        "commands": launch.run_dir.commands,
        "client_pid": os.getpid(),
        "model_folder": str(tmp_path),
        "log_dir": str(launch.log_dir),
        "store": str(launch.run_dir.path / "store-5"),
        "workers": [1] * launch.config.world_size,
        "first_rank": 0,
        "exchange": "",
    }


def test_a_launcher_that_cannot_be_started_is_told(launch: Launch) -> None:
    launch._command = lambda _: ["/no/such/python"]
    with pytest.raises(EngineError, match="cannot be started"):
        launch.spawn()


def test_waiting_stages_do_not_spin_and_stay_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    environment = worker_environment(config_of(2))
    assert environment["OMP_WAIT_POLICY"] == "passive" and environment["GOMP_SPINCOUNT"] == "0"
    assert environment["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
    assert int(environment["OMP_NUM_THREADS"]) >= 1
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert worker_environment(config_of(2))["GLOO_SOCKET_IFNAME"] == "eth7"


def test_the_configs_threads_go_before_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    values = {"base_model_name_or_path": "x", "stage_num_hidden_layers_list": [1]}
    assert worker_environment(config_of(1))["OMP_NUM_THREADS"] == "7"
    config = parse_config({**values, "num_threads": 3}, "a test")
    assert worker_environment(config)["OMP_NUM_THREADS"] == "3"


def test_a_folder_named_engine_beside_the_user_is_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise SystemExit('the wrong engine')")
    done = subprocess.run(
        [sys.executable, "-m", "engine.cli.main", "--help"],
        cwd=tmp_path,
        env=worker_environment(config_of(1)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_client_process_stays_free_of_torch() -> None:
    code = (
        "import sys, engine.client, engine.checkpoint.preflight\n"
        "print([n for n in ('torch', 'transformers', 'textual') if n in sys.modules])"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
