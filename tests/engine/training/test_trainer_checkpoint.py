"""A checkpoint is there as a whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from engine.errors import CheckpointError, EngineError
from engine.training import checkpoint
from engine.training.checkpoint import TRACKER, Loader, find
from engine.training.metrics import RunLog
from tests.engine.training.conftest import SmallDisk
from tests.engine.training.ranks import steps, train_here, without
from tests.tiny import tiny_folder


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    path = tmp_path / "rows.jsonl"
    rows = [{"query": "ask", "response": "abcdefgh"[: 3 + n % 5]} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # fmt: off
    return [
        "--model", str(tiny_folder(layers=2)), "--dataset", str(path), "--add_version", "false",
        "--save", str(tmp_path / "run"), "--split_dataset_ratio", "0", "--log_interval", "1",
        "--global_batch_size", "4", "--medusa_num_heads", "4", "--logging_level", "warning",
        "--save_interval", "1", "--train_iters", "2",
    ]
    # fmt: on


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def resumes(run: Path, words: list[str], at: int) -> None:
    """The run can go on after step `at`, where its last good checkpoint is."""
    assert find(run).name == f"iter_{at:07}"
    more = train_here([*words, "--load", str(run)])
    assert [step["iteration"] for step in steps(more)][-1] == 2
    assert find(run).name == "iter_0000002"
    assert not list(run.glob(".*"))


def test_a_full_disk_is_an_error_that_names_the_last_good_checkpoint(
    words: list[str], small_disk: SmallDisk
) -> None:
    run = train_here([*without(words, "--train_iters"), "--train_iters", "1"])
    good = contents(run / "iter_0000001")
    with small_disk(checkpoint, "_write", 10_000), pytest.raises(EngineError) as caught:
        train_here([*words, "--load", str(run)])
    message = str(caught.value)
    assert "iter_0000002: not saved: File too large" in message
    assert message.endswith(f"the last good checkpoint is {run / 'iter_0000001'}")
    assert "\n" not in message
    assert contents(run / "iter_0000001") == good
    assert not (run / "iter_0000002").exists()
    resumes(run, words, 1)


def test_without_an_earlier_checkpoint_the_error_says_so(
    words: list[str], small_disk: SmallDisk
) -> None:
    with small_disk(checkpoint, "_write", 10_000), pytest.raises(EngineError, match="no earlier"):
        train_here(words)


def test_a_log_that_cannot_be_written_is_named(words: list[str], small_disk: SmallDisk) -> None:
    with (
        small_disk(RunLog, "_append", 600),
        pytest.raises(EngineError, match=r"logging.jsonl: cannot be written: File too large"),
    ):
        train_here(words)


# What is called at each stage of saving; the last between the checkpoint's name and the tracker.
STAGES = ["_write", "_finish", "sync", "shutil.rmtree"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_during_saving_leaves_the_last_good_checkpoint(
    stage: str, words: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pid = os.fork()
    if pid == 0:
        train_until_killed(stage, words)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (run / TRACKER).read_text() == "1\n"
    assert find(run).name == "iter_0000001"
    Loader(find(run))
    resumes(run, words, 1)


def train_until_killed(stage: str, words: list[str]) -> None:
    """In a process of its own: dies when `stage` is called while step 2 is saved."""
    owner, _, name = stage.rpartition(".")
    place = getattr(checkpoint, owner) if owner else checkpoint
    original = getattr(place, name)

    def killing(*args: object, **options: object) -> object:
        path = Path(str(args[0]))
        named = (path.parent / "iter_0000002").exists()
        if "iter_0000002" in str(path) and (stage != "shutil.rmtree" or named):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(place, name, killing)
    try:
        train_here(words)
    finally:
        os._exit(1)


def test_saving_again_over_a_checkpoint_replaces_it(words: list[str]) -> None:
    run = train_here(words)
    (run / "iter_0000001" / "stray").write_text("of before")
    train_here(words)
    assert not (run / "iter_0000001" / "stray").exists()
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("damage", ["cut", "gone", "facts", "tracker"])
def test_damage_is_named(damage: str, words: list[str]) -> None:
    run = train_here(words)
    folder = run / "iter_0000002"
    file = folder / "rank_00000.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    elif damage == "gone":
        file.unlink()
    elif damage == "facts":
        file = folder / "checkpoint.json"
        file.write_text("{")
    else:
        file = run / TRACKER
        file.write_text("latest")
    with pytest.raises(CheckpointError) as caught:
        train_here([*without(words, "--train_iters"), "--train_iters", "3", "--load", str(run)])
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_in_a_checkpoint_is_pickled(words: list[str]) -> None:
    run = train_here(words)
    names = {path.name for path in (run / "iter_0000002").iterdir()}
    assert names == {"checkpoint.json", "rank_00000.safetensors"}
