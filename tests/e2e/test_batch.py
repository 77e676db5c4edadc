"""`jupiter-tui --batch` as it is shipped, with live stages of a tiny random model."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from engine.processes import ProcessHandle, wait_all_gone
from tests.tiny import tiny_folder

COMMAND = str(Path(sys.executable).with_name("jupiter-tui"))
DEADLINE_S = 5.0
LINES = 20
# What the client's process must do without: it stays small and starts at once.
HEAVY = ("textual", "torch", "transformers")
SPY = f"""
import json, sys
from tui.cli import main
out, *words = sys.argv[1:]
code = main(words)
json.dump([name for name in {HEAVY!r} if name in sys.modules], open(out, "w"))
sys.exit(code)
"""


class Batch:
    """Runs the command on files in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.input = folder / "in.jsonl"
        config = {
            "base_model_name_or_path": str(tiny_folder(layers=4)),
            "stage_num_hidden_layers_list": [2, 2],
            "sampling": "greedy",
            "max_kv_cache_length": 256,
            "num_threads": 1,
        }
        (folder / "config.json").write_text(json.dumps(config))
        self.started: list[subprocess.Popen[str]] = []

    def ask(self, *records: dict[str, Any]) -> None:
        self.input.write_text("".join(json.dumps(record) + "\n" for record in records))

    def words(self, *words: str) -> list[str]:
        return ["--config", "config.json", "--batch", self.input.name, *words]

    def start(self, *words: str) -> Run:
        process = subprocess.Popen(
            [COMMAND, *self.words("--progress", "json", *words)],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return Run(process)

    def finish(self, *words: str) -> Run:
        run = self.start(*words)
        run.until_end()
        return run

    def records(self, name: str) -> dict[str, dict[str, Any]]:
        """Output lines by custom_id; each has to be whole and to be there once."""
        data = (self.folder / name).read_text()
        assert data.endswith("\n")
        records = [json.loads(line) for line in data.splitlines()]
        found = {record["custom_id"]: record for record in records}
        assert len(found) == len(records)
        return found

    def answers(self, name: str) -> dict[str, str]:
        return {
            custom_id: record["response"]["body"]["choices"][0]["message"]["content"]
            for custom_id, record in self.records(name).items()
        }


class Run:
    """One process of the command, followed by its progress events."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []

    def next(self) -> dict[str, Any] | None:
        """The next progress event; None at the end."""
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        if not line:
            return None
        self.events.append(json.loads(line))
        return self.events[-1]

    def until(self, event: str, times: int = 1) -> dict[str, Any]:
        """Wait for the n-th `event` from now."""
        while found := self.next():
            times -= found["event"] == event
            if times == 0:
                return found
        raise AssertionError(f"it ended before: {self.events}")

    def until_end(self) -> int:
        while self.next():
            pass
        return self.process.wait()

    def engine(self) -> list[ProcessHandle]:
        """All processes below it, held so that they are known when they have ended."""
        handles = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(ProcessLookupError):
                handles.append(ProcessHandle(child.pid))
        return handles


def assert_gone(handles: list[ProcessHandle]) -> None:
    assert len(handles) >= 3  # torchrun and two stages
    gone = wait_all_gone(handles, DEADLINE_S)
    for handle in handles:
        handle.signal(signal.SIGKILL)
        handle.close()
    assert gone


@pytest.fixture
def make_batch(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Batch]]:
    made: list[Batch] = []

    def make() -> Batch:
        folder = tmp_path_factory.mktemp("batch")
        monkeypatch.setenv("JUPITER_STATE_DIR", str(folder / "state"))
        made.append(Batch(folder))
        return made[-1]

    yield make
    for process in (process for batch in made for process in batch.started):
        process.kill()
        process.wait()
        _close(process.stderr)


def _close(pipe: IO[str] | None) -> None:
    if pipe is not None:
        pipe.close()


@pytest.fixture
def batch(make_batch: Callable[[], Batch]) -> Batch:
    """A batch of prompts of many lengths."""
    batch = make_batch()
    dice = random.Random(7)
    batch.ask(
        *(
            {
                "custom_id": f"q{number}",
                "prompt": "".join(dice.choices("abcdefgh ", k=dice.randint(1, 60))),
                "max_tokens": dice.randint(20, 60),
            }
            for number in range(LINES)
        )
    )
    return batch


@pytest.mark.parametrize("seed", [1])
def test_a_killed_batch_resumed_under_another_split_gives_the_same_answers(
    batch: Batch, seed: int
) -> None:
    whole = batch.finish("-o", "whole.jsonl", "--max-num-seqs", "4")
    assert whole.process.returncode == 0

    run = batch.start("-o", "out.jsonl", "--max-num-seqs", "3")
    run.until("start")
    engine = run.engine()
    run.until("line", times=random.Random(seed).randint(2, LINES // 2))
    run.process.kill()
    run.until_end()
    assert_gone(engine)
    data = (batch.folder / "out.jsonl").read_bytes()
    done = data.count(b"\n")
    assert 2 <= done < LINES

    resumed = batch.finish("-o", "out.jsonl", "--resume", "--stages", "1,2,1")
    assert resumed.process.returncode == 0
    assert resumed.events[-1].items() >= {"skipped": done, "done": LINES - done}.items()
    assert (batch.folder / "out.jsonl").read_bytes().startswith(data[: data.rindex(b"\n") + 1])
    assert batch.answers("out.jsonl") == batch.answers("whole.jsonl")
    splits = {
        tuple(record["response"]["body"]["jupiter"]["stages"])
        for record in batch.records("out.jsonl").values()
    }
    assert splits == {(2, 2), (1, 2, 1)}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_whole_lines_and_without_processes(
    batch: Batch, number: signal.Signals, code: int
) -> None:
    run = batch.start("-o", "out.jsonl", "--max-num-seqs", "2")
    run.until("start")
    engine = run.engine()
    seen = run.until("line", times=3)
    run.process.send_signal(number)
    assert run.until_end() == code
    assert_gone(engine)
    assert 3 <= len(batch.records("out.jsonl")) < LINES
    assert {event["event"] for event in run.events[-4:]} >= {"summary", "error", "note"}
    assert seen["left"] == LINES - 3


def test_a_signal_while_it_starts_ends_it_and_makes_no_output(batch: Batch) -> None:
    run = batch.start("-o", "out.jsonl")
    run.until("stage", times=2)
    engine = run.engine()
    run.process.send_signal(signal.SIGTERM)
    assert run.until_end() == 143
    assert_gone(engine)
    assert not (batch.folder / "out.jsonl").exists()


def test_stages_that_die_are_replaced_and_every_line_is_answered(batch: Batch) -> None:
    run = batch.start("-o", "out.jsonl", "--max-num-seqs", "2")
    run.until("start")
    engine = run.engine()
    run.until("line", times=2)
    # Its keeper with it: torchrun ends all then, and is started anew.
    for process in map(psutil.Process, [handle.pid for handle in engine]):
        if process.name() == "jupiter-rank-1":
            process.kill()
    assert run.until_end() == 0
    assert_gone(engine)
    said = "\n".join(event["message"] for event in run.events if event["event"] == "warning")
    assert "rank 1" in said
    assert "SIGKILL" in said
    assert len(batch.answers("out.jsonl")) == LINES


def test_answers_go_through_pipes_and_a_prompt_longer_than_the_context_fails_its_line(
    make_batch: Callable[[], Batch],
) -> None:
    batch = make_batch()
    batch.ask(
        {"custom_id": "chat", "prompt": "abc", "max_tokens": 8},
        {"custom_id": "long", "prompt": "abc" * 200},
        {
            "custom_id": "raw",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "any", "prompt": "abc", "max_completion_tokens": 9},
        },
        {"custom_id": "same", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 8},
    )
    loaded = batch.folder / "loaded.json"
    words = ["--config", "config.json", "--batch", "-"]
    done = subprocess.run(
        [sys.executable, "-c", SPY, str(loaded), *words],
        cwd=batch.folder,
        input=batch.input.read_text(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    (batch.folder / "out.jsonl").write_text(done.stdout)
    records = batch.records("out.jsonl")
    assert records.keys() == {"chat", "long", "raw", "same"}
    assert records["long"]["error"]["code"] == "prompt_too_long"
    chat, raw, same = (records[name]["response"]["body"] for name in ("chat", "raw", "same"))
    assert chat["choices"][0]["message"] == same["choices"][0]["message"]
    assert chat["jupiter"]["stages"] == [2, 2]
    assert raw["usage"] == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
    assert raw["choices"][0]["finish_reason"] == "length"
    assert raw["choices"][0]["text"]
    assert raw["jupiter"]["mean_accepted_len"] == 1.0
    assert json.loads(loaded.read_text()) == []


def test_bad_input_is_refused_without_the_heavy_libraries(
    make_batch: Callable[[], Batch],
) -> None:
    batch = make_batch()
    batch.ask({"prompt": "fine"}, {"prompt": "n", "n": 2})
    loaded = batch.folder / "loaded.json"
    done = subprocess.run(
        [sys.executable, "-c", SPY, str(loaded), *batch.words("-o", "out.jsonl")],
        cwd=batch.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "jupiter-tui: in.jsonl: line 2: key 'n': 2 is not supported (only 1)\n"
    assert not (batch.folder / "out.jsonl").exists()
    assert json.loads(loaded.read_text()) == []
