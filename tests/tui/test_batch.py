"""A batch run from end to end, with an engine that answers out of this process's memory."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.client import ClientState, StateChanged, Update
from engine.config import JupiterConfig
from engine.errors import CheckpointError, EngineError, JupiterError
from engine.protocol import (
    PROTOCOL_VERSION,
    EngineReady,
    EventEnvelope,
    Failed,
    Finished,
    Message,
    Metrics,
    Notice,
    SamplingParams,
    StageState,
    Started,
    Tokens,
)
from engine.request import RequestStream
from tui import batch

CONFIG = JupiterConfig(base_model_name_or_path="m", stage_num_hidden_layers_list=[1, 1])
READY = EngineReady(
    model="tiny",
    stages=(1, 1),
    device="cpu",
    dtype="float32",
    medusa_num_heads=0,
    tree_size=1,
    context_length=64,
    has_chat_template=True,
)


class Engine:
    """Answers each request with what it was asked; a prompt may also say what goes wrong.

    "fail": the request fails; "cancel": it is cut off; "die": the engine dies; "wait": the
    answer comes when the next request has been answered.
    """

    made: list[Engine]
    start_error: JupiterError | None = None

    def __init__(
        self, config: JupiterConfig, *, listener: Callable[[Update], None], hub: None = None
    ) -> None:
        self.config = config
        self.tell = listener
        self.asked: list[tuple[str, SamplingParams]] = []
        self.open = self.most_open = self.stops = 0
        self.waiting: list[RequestStream] = []
        self.dead = False
        Engine.made.append(self)

    async def start(self) -> EngineReady:
        if self.start_error:
            self.dead = True
            self.tell(StateChanged(ClientState.DEAD, str(self.start_error)))
            raise self.start_error
        self.tell(EventEnvelope(PROTOCOL_VERSION, 1, 0, StageState(phase="ready")))
        return READY

    def submit(
        self,
        *,
        messages: Sequence[Message] | None = None,
        prompt: str | None = None,
        params: SamplingParams,
    ) -> RequestStream:
        if self.dead:
            raise EngineError("the engine is draining, not ready")
        asked = prompt if messages is None else messages[-1].content
        assert asked is not None
        self.asked.append((asked, params))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        stream = RequestStream(f"r{len(self.asked)}")
        asyncio.get_running_loop().call_soon(self.play, stream, asked)
        return stream

    def play(self, stream: RequestStream, asked: str) -> None:
        self.open -= asked != "wait"
        match asked:
            case "fail":
                error = "70 tokens; 64 fit"
                stream.put(
                    Failed(request_id=stream.request_id, message=error, code="prompt_too_long")
                )
            case "wait":
                self.waiting.append(stream)
            case "die":
                self.die(stream)
            case _:
                answer(stream, asked, "cancelled" if asked == "cancel" else "stop")
                while self.waiting:
                    self.open -= 1
                    answer(self.waiting.pop(), "late")

    def die(self, stream: RequestStream) -> None:
        self.dead = True
        reason = "rank 1 (process 7) was killed by SIGKILL"
        for each in (stream, *self.waiting):
            each.fail(EngineError(reason))
        self.tell(StateChanged(ClientState.DEAD, reason))

    async def stop(self) -> None:
        self.stops += 1
        if not self.dead:
            self.tell(StateChanged(ClientState.DEAD, "the engine was stopped"))


def answer(stream: RequestStream, text: str, reason: Any = "stop") -> None:
    name = stream.request_id
    stream.put(Started(request_id=name, prompt_tokens=5, cached_tokens=0))
    for character in text:
        stream.put(Tokens(request_id=name, token_ids=(ord(character),), text=character))
    stream.put(
        Finished(
            request_id=name,
            finish_reason=reason,
            context_full=False,
            prompt_tokens=5,
            cached_tokens=0,
            completion_tokens=len(text),
            metrics=Metrics(),
        )
    )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    Engine.made = []
    monkeypatch.setattr(batch, "EngineClient", Engine)
    return Engine


class Job:
    """One batch: its files, and how to run it."""

    def __init__(self, folder: Path) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"

    def ask(self, *prompts: str) -> None:
        lines = [json.dumps({"custom_id": f"{at}", "prompt": p}) for at, p in enumerate(prompts)]
        self.input.write_text("\n".join(lines))

    def run(self, **changes: Any) -> int:
        args = {
            "batch": str(self.input),
            "output": str(self.output),
            "resume": False,
            "progress": "auto",
            "max_failures": None,
            "max_num_seqs": None,
            "telemetry_json": False,
            **changes,
        }
        return batch.main(argparse.Namespace(**args), CONFIG)

    def answers(self) -> dict[str, str]:
        """Answer or error code by custom_id, in the order of the file; each id once."""
        found: dict[str, str] = {}
        for line in self.output.read_text().splitlines():
            record = json.loads(line)
            assert record["custom_id"] not in found
            found[record["custom_id"]] = (
                record["response"]["body"]["choices"][0]["message"]["content"]
                if record["error"] is None
                else record["error"]["code"]
            )
        return found


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_all_lines_answered_is_exit_code_0(engine, job: Job, capfd) -> None:
    job.ask("one", "two")
    assert job.run() == 0
    assert job.answers() == {"0": "one", "1": "two"}
    assert engine.made[0].stops == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "2 done, 0 failed, 0 skipped; 6 tokens in" in err


def test_answers_are_written_in_the_order_of_their_ends(engine, job: Job) -> None:
    job.ask("wait", "two")
    assert job.run() == 0
    assert list(job.answers().items()) == [("1", "two"), ("0", "late")]


def test_a_failed_line_is_written_and_is_exit_code_1(engine, job: Job, capfd) -> None:
    job.ask("one", "fail", "cancel", "two")
    assert job.run() == 1
    assert job.answers() == {"0": "one", "1": "prompt_too_long", "2": "cancelled", "3": "two"}
    assert "line 2 (1) failed: 70 tokens; 64 fit" in capfd.readouterr().err


def test_parameters_of_a_line_reach_the_engine(engine, job: Job) -> None:
    job.input.write_text('{"prompt": "a", "max_tokens": 3, "seed": 5, "stop": "x"}')
    assert job.run() == 0
    assert engine.made[0].asked == [("a", SamplingParams(max_tokens=3, seed=5, stop=("x",)))]


def test_no_more_requests_are_open_than_the_engine_can_use(engine, job: Job) -> None:
    job.ask(*(f"{n}" for n in range(50)))
    assert job.run(max_num_seqs=3) == 0
    assert engine.made[0].config.max_num_seqs == 3
    assert 3 <= engine.made[0].most_open <= 3 + batch.QUEUE_AHEAD
    assert len(job.answers()) == 50


@pytest.mark.parametrize(
    ("lines", "changes"),
    [
        ("{", {}),
        ("", {}),
        ('{"prompt": "a"}', {"resume": True, "output": "-"}),
        ('{"prompt": "a"}', {"output": "/no/such/folder/out.jsonl"}),
        ('{"prompt": "a"}', {"batch": "/no/such/file"}),
        ('{"prompt": "a"}', {"batch": "/"}),
    ],
)
def test_bad_input_is_exit_code_2_and_nothing_runs(
    engine, job: Job, capfd, lines: str, changes: dict[str, Any]
) -> None:
    job.input.write_text(lines)
    assert job.run(**changes) == 2
    assert engine.made == []
    assert not job.output.exists()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("jupiter-tui: ")
    assert err.count("\n") == 1


def test_an_input_like_its_output_is_left_alone(engine, job: Job, capfd) -> None:
    job.ask("one")
    before = job.input.read_bytes()
    assert job.run(output=str(job.input)) == 2
    assert job.input.read_bytes() == before
    assert "is the input itself" in capfd.readouterr().err


def test_resuming_asks_only_what_is_not_answered(engine, job: Job, capfd) -> None:
    job.ask("one", "fail", "three", "four")
    assert job.run() == 1
    first = job.output.read_bytes().splitlines(keepends=True)
    job.output.write_bytes(b"".join(first[:2]) + first[2][:30])
    job.ask("one", "mended", "three", "four")
    assert job.run(resume=True) == 0
    assert [asked for asked, _ in engine.made[1].asked] == ["mended", "three", "four"]
    assert job.answers() == {"0": "one", "1": "mended", "2": "three", "3": "four"}
    assert job.output.read_bytes().startswith(first[0])
    assert "3 done, 0 failed, 1 skipped" in capfd.readouterr().err


def test_resuming_a_finished_batch_starts_no_engine(engine, job: Job, capfd) -> None:
    job.ask("one")
    assert job.run() == 0
    before = job.output.read_bytes()
    assert job.run(resume=True) == 0
    assert len(engine.made) == 1
    assert job.output.read_bytes() == before
    assert "0 done, 0 failed, 1 skipped" in capfd.readouterr().err


def test_resuming_what_was_never_begun_begins_it(engine, job: Job) -> None:
    job.ask("one")
    assert job.run(resume=True) == 0
    assert job.answers() == {"0": "one"}


def test_an_answer_that_is_not_in_the_input_is_kept_and_told(engine, job: Job, capfd) -> None:
    job.ask("one", "two")
    assert job.run() == 0
    job.input.write_text('{"custom_id": "0", "prompt": "one"}\n{"custom_id": "9", "prompt": "9"}')
    assert job.run(resume=True) == 0
    assert job.answers() == {"0": "one", "1": "two", "9": "9"}
    assert "'1' is not in the input; kept" in capfd.readouterr().err


def test_enough_failures_stop_the_run(engine, job: Job, capfd) -> None:
    job.ask(*["fail"] * 20)
    assert job.run(max_failures=3, max_num_seqs=1) == 1
    assert 3 <= len(job.answers()) < 20
    err = capfd.readouterr().err
    assert "failed lines" in err
    assert "--resume" in err


def test_an_engine_that_dies_keeps_what_is_done_and_says_why(engine, job: Job, capfd) -> None:
    job.ask("one", "two", "die", "four", "five", "six")
    assert job.run(max_num_seqs=1) == 3
    answers = job.answers()
    assert {"0", "1"} <= answers.keys()
    assert "2" not in answers
    err = capfd.readouterr().err
    assert "jupiter-tui: rank 1 (process 7) was killed by SIGKILL\n" in err
    assert "draining" not in err
    assert "out.jsonl; --resume goes on" in err
    assert engine.made[0].stops == 1


def test_answers_that_came_before_the_engine_died_are_kept(engine, job: Job) -> None:
    # All are asked before the first is answered, so the end is seen before the last answer.
    job.ask("die", "one", "two", "three")
    assert job.run() == 3
    assert job.answers() == {"1": "one", "2": "two", "3": "three"}


@pytest.mark.parametrize(
    ("error", "code"), [(CheckpointError("no model.safetensors"), 2), (EngineError("slow"), 3)]
)
def test_an_engine_that_does_not_start_leaves_the_output_alone(
    engine, job: Job, capfd, monkeypatch: pytest.MonkeyPatch, error: JupiterError, code: int
) -> None:
    monkeypatch.setattr(Engine, "start_error", error)
    job.ask("one")
    assert job.run() == code
    assert not job.output.exists()
    assert capfd.readouterr().err == f"jupiter-tui: {error}\n"
    torn = b'{"id":"'
    job.output.write_bytes(torn)
    assert job.run(resume=True) == code
    assert job.output.read_bytes() == torn


def test_a_full_disk_is_exit_code_3(engine, job: Job, capfd) -> None:
    job.ask("one", "two")
    assert job.run(output="/dev/full") == 3
    err = capfd.readouterr().err
    assert "/dev/full: cannot write: No space left on device" in err
    assert engine.made[0].stops == 1


def test_answers_alone_go_to_standard_output(engine, job: Job, capfd) -> None:
    job.ask("one", "fail")
    assert job.run(output=None) == 1
    out, err = capfd.readouterr()
    assert [json.loads(line)["custom_id"] for line in out.splitlines()] == ["0", "1"]
    assert "--resume" not in err


def test_progress_none_says_only_what_is_wrong(engine, job: Job, capfd) -> None:
    job.ask("one")
    assert job.run(progress="none") == 0
    assert capfd.readouterr() == ("", "")
    assert job.run(progress="none") == 2
    assert "exists" in capfd.readouterr().err


def test_progress_json_is_one_object_per_line(engine, job: Job, capfd) -> None:
    job.ask("one", "fail")
    assert job.run(progress="json") == 1
    events = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [event.pop("event") for event in events] == ["stage", "start", "line", "line", "summary"]
    assert events[1] == {"todo": 2, "skipped": 0}
    assert (events[3]["custom_id"], events[3]["error"]) == ("1", "70 tokens; 64 fit")
    assert events[4].items() >= {"done": 1, "failed": 1, "left": 0, "tokens": 3}.items()
    job.input.write_text("{\n{")
    assert job.run(progress="json", output="-") == 2
    errors = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [error["event"] for error in errors] == ["error", "error"]


def test_a_notice_of_the_engine_is_passed_on(engine, job: Job, capfd, monkeypatch) -> None:
    async def start(self: Engine) -> EngineReady:
        self.tell(EventEnvelope(PROTOCOL_VERSION, 1, 0, Notice("3 messages were dropped")))
        return READY

    monkeypatch.setattr(Engine, "start", start)
    job.ask("one")
    assert job.run(progress="none") == 0
    assert capfd.readouterr().err == "jupiter-tui: 3 messages were dropped\n"


def test_a_reader_that_stops_reading_ends_the_run_quietly(engine, job: Job, capfd) -> None:
    job.ask("one", "two")
    saved = os.dup(1)
    read, end = os.pipe()
    os.close(read)
    os.dup2(end, 1)
    os.close(end)
    try:
        assert job.run(output="-", progress="none") == 141
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert capfd.readouterr() == ("", "")
    assert engine.made[0].stops == 1


# An engine that answers the first request and no other; its stop never ends when told so.
STUCK = """
import asyncio, signal, sys
# Whoever runs the tests may ignore hang-ups, as nohup does; the run would honour that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from tests.tui.test_batch import Engine, batch
from tui import cli

class Stuck(Engine):
    def play(self, stream, asked):
        if stream.request_id == "r1":
            super().play(stream, asked)

    async def stop(self):
        if sys.argv[1] == "hangs":
            await asyncio.Event().wait()

    def kill_now(self):
        print("killed", file=sys.stderr)

Engine.made = []
batch.EngineClient = Stuck
sys.exit(cli.main(sys.argv[2:]))
"""


def start_stuck(job: Job, stop: str) -> subprocess.Popen[str]:
    """A process that has written one answer and waits for the second."""
    job.ask("one", "two")
    words = ["--batch", str(job.input), "-o", str(job.output), "--progress", "json"]
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, stop, *words, "--stages", "1,1"],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(process, "line")
    return process


def wait_for(process: subprocess.Popen[str], event: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if json.loads(line)["event"] == event:
            return
    raise AssertionError(f"it ended without '{event}'")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_run_with_what_is_done(job: Job, number: int, code: int) -> None:
    with start_stuck(job, "ends") as process:
        process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == code
    assert job.answers() == {"0": "one"}
    events = [json.loads(line) for line in err.splitlines()]
    assert [event["event"] for event in events] == ["note", "summary", "error", "note"]
    assert events[2]["message"] == f"stopped by {signal.Signals(number).name}"
    assert "--resume" in events[3]["message"]


def test_a_second_signal_ends_the_run_at_once(job: Job) -> None:
    with start_stuck(job, "hangs") as process:
        process.send_signal(signal.SIGINT)
        wait_for(process, "note")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err == "killed\n"
    assert job.answers() == {"0": "one"}
