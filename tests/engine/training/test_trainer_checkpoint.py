"""A checkpoint is there as a whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest

from engine.checkpoint.mcore import read_common
from engine.errors import CheckpointError, EngineError
from engine.training import saving
from engine.training.checkpoint import TRACKER, find
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
    with small_disk(saving, "_write_dist", 10_000), pytest.raises(EngineError) as caught:
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
    with small_disk(saving, "_write_dist", 10_000), pytest.raises(EngineError, match="no earlier"):
        train_here(words)


def test_a_log_that_cannot_be_written_is_named(words: list[str], small_disk: SmallDisk) -> None:
    with (
        small_disk(RunLog, "_append", 600),
        pytest.raises(EngineError, match=r"logging.jsonl: cannot be written: File too large"),
    ):
        train_here(words)


@pytest.mark.parametrize("way", ["medusa", "sft", "sft async", "sft torch"])
def test_a_kill_at_any_moment_of_saving_leaves_the_last_good_checkpoint(
    way: str, words: list[str], tmp_path: Path, full: bool
) -> None:
    """Counts what saving does with files, and dies before the n-th of it, for random n."""
    command, _, option = way.partition(" ")
    more = {"async": ["--async_save", "true"], "torch": ["--ckpt_format", "torch"]}
    words = [*words, *more.get(option, [])]
    if command == "sft":
        words = without(words, "--medusa_num_heads")
    dice = random.Random(way)
    whole, _ = moments(command, words, tmp_path, at=None)
    assert whole > 10
    tried = dice.sample(range(1, whole), min(whole - 1, 20 if full else 2))
    for moment in tried:
        shutil.rmtree(tmp_path / "run")
        seen, status = moments(command, words, tmp_path, at=moment)
        assert os.WIFSIGNALED(status), f"moment {moment} of {whole} did not come, {seen} did"
        run = tmp_path / "run"
        number = int((run / TRACKER).read_text())
        assert find(run).name == f"iter_{number:07}"
        if number == 2:
            continue  # it died just after all was done
        more = train_here([*words, "--load", str(run)], command)  # type: ignore[arg-type]
        assert [step["iteration"] for step in steps(more)][-1] == 2
        assert find(run).name == "iter_0000002"
        assert not list(run.glob(".*"))


def moments(command: str, words: list[str], tmp_path: Path, at: int | None) -> tuple[int, int]:
    """Train in a process of its own that dies at a moment of saving step 2.

    Returns how many moments there were, and how the process ended.
    """
    counted = tmp_path / "counted"
    counted.write_text("0")
    pid = os.fork()
    if pid == 0:
        _die_at(command, words, counted, at)
    _, status = os.waitpid(pid, 0)
    return int(counted.read_text()), status


def _die_at(command: str, words: list[str], counted: Path, at: int | None) -> None:
    calls = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
    count, begun = 0, False

    def look(event: str, args: tuple[object, ...]) -> None:
        nonlocal count, begun
        if event not in calls or not isinstance(args[0], str | bytes | Path):
            return
        path = os.fsdecode(args[0])  # type: ignore[arg-type]
        if begun and path.startswith(str(counted.parent / "run")):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
        begun = begun or "iter_0000002.partial" in path

    sys.addaudithook(look)
    try:
        train_here(words, command)  # type: ignore[arg-type]
        counted.write_text(str(count))
    finally:
        os._exit(0)


def test_saving_again_over_a_checkpoint_replaces_it(words: list[str]) -> None:
    run = train_here(words)
    (run / "iter_0000001" / "stray").write_text("of before")
    train_here(words)
    assert not (run / "iter_0000001" / "stray").exists()
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("damage", ["cut", "gone", "facts", "metadata", "tracker"])
def test_damage_is_named(damage: str, words: list[str]) -> None:
    run = train_here(words)
    folder = run / "iter_0000002"
    file = folder / "__0_0.distcp"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-2000])
    elif damage == "gone":
        file.unlink()
    elif damage == "facts":
        file = folder / "common.pt"
        file.write_text("{")
    elif damage == "metadata":
        file = folder / ".metadata"
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file = run / TRACKER
        file.write_text("latest")
    with pytest.raises(CheckpointError) as caught:
        train_here([*without(words, "--train_iters"), "--train_iters", "3", "--load", str(run)])
    assert str(file if damage != "cut" else folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_has_the_files_of_megatron_core(words: list[str]) -> None:
    run = train_here(words)
    names = {path.name for path in (run / "iter_0000002").iterdir()}
    assert names == {".metadata", "__0_0.distcp", "common.pt", "metadata.json"}
    common = read_common(run / "iter_0000002")
    assert (common["iteration"], common["checkpoint_version"]) == (2, 3.0)
    assert common["args"].tensor_model_parallel_size == 1
