"""Run folders and the list of them."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from engine.errors import ConfigError
from tui.run_folders import RunProcess, read_run, recent_runs, remember, write_process


def make(path: Path, *, steps: int | None = None, heads: bool = False) -> Path:
    path.mkdir(parents=True)
    (path / "args.json").write_text('{"dataset": ["rows.jsonl"]}')
    if steps is not None:
        (path / "latest_checkpointed_iteration.txt").write_text(f"{steps}\n")
    if heads:
        (path / "heads").mkdir()
    return path


def test_a_folder_tells_how_its_run_stands(tmp_path: Path) -> None:
    assert read_run(make(tmp_path / "a")).status == "ended"
    stopped = read_run(make(tmp_path / "b", steps=40))
    assert (stopped.status, stopped.checkpoint) == ("stopped", 40)
    assert read_run(make(tmp_path / "c", steps=50, heads=True)).status == "finished"


def test_a_run_goes_on_as_long_as_just_its_process_does(tmp_path: Path) -> None:
    run = make(tmp_path / "a", steps=3)
    log = tmp_path / "a.log"
    log.touch()
    write_process(run, os.getpid(), log)
    assert read_run(run).status == "running"
    assert read_run(run).log == log
    created = psutil.Process().create_time()
    assert not RunProcess(os.getpid(), created - 100, "").alive  # the pid is in use again


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_what_is_no_run_folder_is_named(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "args.json").write_text(text)
    with pytest.raises(ConfigError, match=r"args\.json"):
        read_run(tmp_path)


def test_runs_are_remembered_and_those_of_the_default_folder_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old = make(tmp_path / "elsewhere" / "v0-20260101-000000")
    new = make(tmp_path / "megatron_output" / "model" / "v1-20260101-000001")
    os.utime(old, (1, 1))
    gone = make(tmp_path / "gone")
    for path in (old, gone):
        remember(path)
    (gone / "args.json").unlink()
    assert [run.path for run in recent_runs()] == [new, old]


def test_a_damaged_list_is_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    remember(make(tmp_path / "a"))
    (tmp_path / "state" / "training" / "runs.json").write_text("[1, {")
    assert recent_runs() == []
