"""A worker without torch: speaks the real protocol and does what the prompts tell it.

    python fake_worker.py RUN_DIR                  one rank, as torchrun starts it
    python fake_worker.py --agent N LOG_DIR RUN_DIR  a small stand-in for torchrun

A prompt is a script for one rank: "[rankN] VERB ARGS" (rank 0 without one). So is the environment
variable FAKE_WORKER, obeyed instead of getting ready.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import zmq

from engine.endpoint import Endpoint, watch_owners
from engine.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    EngineReady,
    Event,
    EventEnvelope,
    Failed,
    Finished,
    Generate,
    Metrics,
    Notice,
    Shutdown,
    StageState,
    StageTelemetry,
    Started,
    Tokens,
    WorkerError,
    encode,
)


class FakeWorker:
    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self.run = json.loads(Path(run_dir, "run.json").read_text())
        self.rank = int(os.environ["RANK"])
        self.world = int(os.environ["WORLD_SIZE"])
        watch_owners(self.run["client_pid"])
        self.endpoint = Endpoint(
            self.run["events"], self.run["commands"], rank=self.rank, epoch=self.run["epoch"]
        )
        self.endless: set[str] = set()

    def serve(self) -> int:
        self.obey(os.environ.get("FAKE_WORKER", ""), "start")
        self.endpoint.send(StageState(phase="starting", pid=os.getpid()))
        assert self.endpoint.wait_subscribed(30)
        self.endpoint.send(StageState(phase="ready", pid=os.getpid()))
        Path(self.run_dir, f"ready{self.rank}").touch()
        if self.rank == 0:
            self.obey(os.environ.get("FAKE_WORKER_0", ""), "start")
            while len(list(Path(self.run_dir).glob("ready*"))) < self.world:
                time.sleep(0.01)
            self.endpoint.send(ready(self.world))
        if pause := os.environ.get("FAKE_TELEMETRY"):
            threading.Thread(target=self.tell, args=(float(pause),), daemon=True).start()
        while True:
            match self.endpoint.inbox.get():
                case Generate(request_id=request_id, prompt=prompt, messages=messages):
                    self.obey(prompt or (messages or ())[-1].content, request_id)
                case Cancel(request_id):
                    if request_id in self.endless:
                        self.finish(request_id, "cancelled")
                case Shutdown():
                    self.endpoint.send(StageState(phase="stopped"))
                    self.endpoint.close()
                    return 0

    def obey(self, script: str, request_id: str) -> None:
        words = script.split()
        rank = 0
        if words and words[0].startswith("rank"):
            rank = int(words.pop(0).removeprefix("rank"))
        if words and rank == self.rank:
            getattr(self, f"do_{words[0]}")(request_id, *words[1:])

    # --- verbs -----------------------------------------------------------------------------------

    def do_tokens(self, request_id: str, count: str) -> None:
        self.send(Started(request_id=request_id, prompt_tokens=3, cached_tokens=1))
        for token in range(int(count)):
            self.send(Tokens(request_id=request_id, token_ids=(token,), text=f"t{token} "))
        self.finish(request_id, "stop", int(count))

    def do_endless(self, request_id: str) -> None:
        self.endless.add(request_id)
        self.send(Started(request_id=request_id, prompt_tokens=3, cached_tokens=0))
        self.send(Tokens(request_id=request_id, token_ids=(1,), text="on "))

    def do_fail(self, request_id: str) -> None:
        self.send(Failed(request_id=request_id, message="too long", code="prompt_too_long"))

    def do_exit(self, request_id: str, code: str) -> None:
        for line in range(20):
            print(f"line {line} of rank {self.rank}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(int(code))

    def do_kill(self, request_id: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def do_error(self, request_id: str, code: str, *message: str) -> None:
        self.send(WorkerError(message=" ".join(message), exit_code=int(code)))
        self.endpoint.close()
        os._exit(int(code))

    def do_progress(self, request_id: str, count: str, pause_s: str) -> None:
        """Report loading now and then: a start that is slow, but alive."""
        for done in range(int(count)):
            self.send(StageState(phase="loading", done=done, total=int(count), pid=os.getpid()))
            time.sleep(float(pause_s))

    def do_hang(self, request_id: str) -> None:
        """Deaf to Shutdown and to SIGTERM, as in a blocking receive."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.send(Started(request_id=request_id, prompt_tokens=1, cached_tokens=0))
        while True:
            signal.pause()

    def do_frames(self, request_id: str) -> None:
        """Frames that must not count: no msgpack, another version, epoch, rank, type."""
        epoch, telemetry = self.run["epoch"], a_telemetry()
        frames = [
            b"junk",
            b"",
            encode(EventEnvelope(PROTOCOL_VERSION + 1, epoch, 0, telemetry)),
            encode(EventEnvelope(PROTOCOL_VERSION, epoch - 1, 0, telemetry)),
            encode(EventEnvelope(PROTOCOL_VERSION, epoch, 99, telemetry)),
            encode(EventEnvelope(PROTOCOL_VERSION, epoch, 0, telemetry))[:-4],
        ]
        with zmq.Context() as context, context.socket(zmq.PUSH) as push:
            push.connect(self.run["events"])
            for frame in frames:
                push.send(frame)
        self.do_tokens(request_id, "1")

    def do_flood(self, request_id: str, count: str) -> None:
        for number in range(int(count)):
            self.send(Notice(f"notice {number}"))
            self.send(Tokens(request_id=request_id, token_ids=(number,), text="x"))
        self.finish(request_id, "length", int(count))

    def tell(self, pause: float) -> None:
        while True:
            self.send(a_telemetry())
            time.sleep(pause)

    # --- helpers ---------------------------------------------------------------------------------

    def send(self, event: Event) -> None:
        self.endpoint.send(event)

    def finish(self, request_id: str, reason: str, tokens: int = 1) -> None:
        self.send(
            Finished(
                request_id=request_id,
                finish_reason=reason,  # type: ignore[arg-type]
                context_full=False,
                prompt_tokens=3,
                cached_tokens=0,
                completion_tokens=tokens,
                metrics=Metrics(),
            )
        )


def a_telemetry() -> StageTelemetry:
    return StageTelemetry(
        layers=1, memory_bytes=1, memory_kind="process", busy_s=0, wait_s=0, steps=1, rows=1
    )


def ready(world: int) -> EngineReady:
    return EngineReady(
        model="fake",
        stages=(1,) * world,
        device="cpu",
        dtype="float32",
        medusa_num_heads=0,
        tree_size=1,
        context_length=100,
        has_chat_template=True,
    )


def agent(world: int, log_dir: Path, run_dir: str) -> int:
    """Start the ranks as torchrun does: own sessions, a log each; stop all when one fails."""
    client = json.loads(Path(run_dir, "run.json").read_text())["client_pid"]
    watch_owners(client)
    workers = []
    for rank in range(world):
        folder = log_dir / "fake" / "attempt_0" / str(rank)
        folder.mkdir(parents=True)
        with (folder / "stderr.log").open("wb") as log:
            workers.append(
                subprocess.Popen(
                    [sys.executable, __file__, run_dir],
                    env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world)},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def pass_on(number: int, frame: object) -> None:
        for worker in workers:
            worker.send_signal(number)
        sys.exit(1)

    signal.signal(signal.SIGTERM, pass_on)
    while any(worker.poll() is None for worker in workers):
        failed = [rank for rank, worker in enumerate(workers) if worker.poll()]
        for rank in failed:
            code, pid = workers[rank].returncode, workers[rank].pid
            print(f"E failed (exitcode: {code}) local_rank: {rank} (pid: {pid}) of binary: fake")
        if failed:
            sys.stdout.flush()
            pass_on(signal.SIGTERM, None)
        time.sleep(0.02)
    return max(bool(worker.returncode) for worker in workers)


if __name__ == "__main__":
    if sys.argv[1] == "--agent":
        sys.exit(agent(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]))
    # As the keeper does, where this is a fork of torchrun.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if code := FakeWorker(sys.argv[1]).serve():
        os._exit(code)
