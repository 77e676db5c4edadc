"""`jupiter medusa generate` as it is shipped, with a live stage of a tiny random model."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.checkpoint.tokenizer import ensure_tokenizer
from engine.processes import ProcessHandle, wait_all_gone
from engine.text import TextCodec
from engine.training.args import TrainArguments
from engine.training.data import load_samples
from tests.tiny import tiny_folder

COMMAND = str(Path(sys.executable).with_name("jupiter"))
DEADLINE_S = 5.0
PROMPTS = 16
LONG = "x" * 600  # more than the context holds


class Generation:
    """The command on files in one folder, followed by its progress events."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "out.jsonl"
        config = {
            "base_model_name_or_path": str(tiny_folder(layers=4)),
            "stage_num_hidden_layers_list": [2, 2],
            "max_kv_cache_length": 256,
            "num_threads": 1,
        }
        (folder / "config.json").write_text(json.dumps(config))
        dice = random.Random(7)
        prompts = [
            {"id": f"q{number}", "query": "".join(dice.choices("abcdefgh ", k=dice.randint(1, 60)))}
            for number in range(PROMPTS)
        ]
        turns = [{"role": "user", "content": text} for text in ("one", "two")]
        self.write("prompts.jsonl", *prompts, {"id": "turns", "messages": turns})
        self.started: list[subprocess.Popen[str]] = []

    def write(self, name: str, *records: dict[str, Any]) -> None:
        text = "".join(json.dumps(record) + "\n" for record in records)
        (self.folder / name).write_text(text)

    def start(self, *words: str) -> subprocess.Popen[str]:
        common = ["--output", "out.jsonl", "--max_new_tokens", "30", "--progress", "json"]
        process = subprocess.Popen(
            [COMMAND, "medusa", "generate", "--dataset", "prompts.jsonl", *common, *words],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def rows(self) -> dict[str, dict[str, Any]]:
        """Output rows by id; each has to be whole and to be there once."""
        data = self.output.read_text()
        assert data.endswith("\n")
        rows = [json.loads(line) for line in data.splitlines()]
        found = {row["id"]: row for row in rows}
        assert len(found) == len(rows)
        return found


def until(process: subprocess.Popen[str], event: str, times: int = 1) -> dict[str, Any]:
    """Wait for the n-th such progress event from now."""
    assert process.stderr is not None
    for line in process.stderr:
        found: dict[str, Any] = json.loads(line)
        times -= found["event"] == event
        if times == 0:
            return found
    raise AssertionError(f"ended without {event}")


def engine_of(process: subprocess.Popen[str]) -> list[ProcessHandle]:
    return [ProcessHandle(p.pid) for p in psutil.Process(process.pid).children(recursive=True)]


def assert_gone(handles: list[ProcessHandle]) -> None:
    assert len(handles) >= 3  # torchrun and two stages
    gone = wait_all_gone(handles, DEADLINE_S)
    for handle in handles:
        handle.signal(signal.SIGKILL)
        handle.close()
    assert gone


@pytest.fixture
def generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Generation]:
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "state"))
    made = Generation(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def test_a_killed_generation_goes_on_and_its_rows_are_training_data(
    generation: Generation,
) -> None:
    killed = generation.start("--max-num-seqs", "2")
    until(killed, "start")
    engine = engine_of(killed)
    until(killed, "answer", times=4)
    killed.kill()
    killed.wait()
    assert_gone(engine)
    first = generation.output.read_bytes()
    done = first.count(b"\n")
    assert 4 <= done < PROMPTS
    generation.output.write_bytes(first + b'{"id": "q1')  # as a full disk might leave it

    again = generation.start()
    assert until(again, "start").items() >= {"skipped": done, "left": PROMPTS + 1 - done}.items()
    summary = until(again, "summary")
    assert again.wait() == 0
    assert summary.items() >= {"failed": 0, "left": 0, "remaining_s": 0.0}.items()
    rows = generation.rows()
    assert rows.keys() == {"turns", *(f"q{number}" for number in range(PROMPTS))}
    assert generation.output.read_bytes().startswith(first)
    made_by = {"model": "llama-4", "max_new_tokens": 30, "temperature": 0.0}
    assert all(row["generated_by"] == made_by for row in rows.values())
    check_training_data(generation.output, rows)


def check_training_data(output: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Every row becomes a sample in which the model's own words are learnt."""
    folder = tiny_folder(layers=4)
    codec = TextCodec(folder, ensure_tokenizer(folder), [])
    args = TrainArguments(dataset=[str(output)], split_dataset_ratio=0.0)
    samples = load_samples(args, codec, "train")
    assert len(samples) == len(rows)
    for sample, row in zip(samples, rows.values(), strict=True):
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        end = "" if row["finish_reason"] == "length" else "<|im_end|>"
        text = codec.tokenizer.decode(
            sample.tokens[sample.targets].tolist(), skip_special_tokens=False
        )
        assert text == "<|im_end|>".join(answers) + end
    assert {row["finish_reason"] for row in rows.values()} >= {"length"}


def test_a_prompt_that_cannot_be_answered_fails_alone_and_a_signal_ends_it_cleanly(
    generation: Generation,
) -> None:
    generation.write("prompts.jsonl", {"id": "long", "query": LONG}, {"id": "a", "query": "abc"})
    run = generation.start("--temperature", "0.9", "--top_p", "0.9")
    failed = until(run, "answer")
    if failed["id"] == "a":
        failed = until(run, "answer")
    assert failed["id"] == "long"
    assert "context" in failed["error"]
    assert run.wait() == 1
    assert generation.rows()["a"]["generated_by"]["top_p"] == 0.9

    other = generation.start()
    assert other.wait() == 2  # the same file, but another temperature
    assert other.stderr is not None
    assert "out.jsonl: line 1: was made by" in other.stderr.read()

    generation.output.unlink()
    stopped = generation.start()
    until(stopped, "stage", times=2)
    engine = engine_of(stopped)
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait() == 130
    assert_gone(engine)
