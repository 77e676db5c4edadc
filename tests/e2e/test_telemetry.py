"""Telemetry of live stages on a tiny model: in the store, and as `--telemetry-json` prints it."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.client import EngineClient, Update
from engine.config import parse_config
from engine.protocol import Message, SamplingParams
from tests.tiny import tiny_folder
from tui.telemetry import StageView, TelemetryStore

COMMAND = str(Path(sys.executable).with_name("jupiter-tui"))
UNITS = ("_s", "_bytes", "_ms", "_share", "_per_s")
COUNTS = {"rank", "first_layer", "layers", "pid", "steps", "rows", "decode_steps", "prefill_rows"}
COUNTS |= {"requests_running", "requests_finished", "tokens"}


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


def settings(split: list[int]) -> dict[str, Any]:
    return {
        "base_model_name_or_path": str(tiny_folder()),
        "stage_num_hidden_layers_list": split,
        "device": "cpu",
        "num_threads": 1,
        "sampling": "greedy",
        "max_kv_cache_length": 256,
    }


class Live:
    """A live engine, and the store that hears it."""

    def __init__(self, split: list[int]) -> None:
        self.store = TelemetryStore()
        self.client = EngineClient(parse_config(settings(split), "test"), listener=self._listen)
        self._heard = asyncio.Event()

    def _listen(self, update: Update) -> None:
        self.store.on_update(update)
        self._heard.set()

    def stages(self) -> tuple[StageView, ...]:
        return self.store.view().stages

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for updates until `condition` holds; staleness comes without an update."""
        async with asyncio.timeout(30):
            while not condition():
                self._heard.clear()
                try:
                    await asyncio.wait_for(self._heard.wait(), 0.2)
                except TimeoutError:
                    continue

    async def ask(self, words: int = 30) -> None:
        params = SamplingParams(temperature=0, max_tokens=60)
        messages = [Message("user", "word " * words)]
        async for _ in self.client.submit(messages=messages, params=params):
            pass


@asynccontextmanager
async def live(split: list[int]) -> AsyncIterator[Live]:
    engine = Live(split)
    try:
        await engine.client.start()
        yield engine
    finally:
        await engine.client.stop()


async def test_live_stages_account_for_all_their_time() -> None:
    async with live([2, 2, 2]) as engine:
        await engine.until(lambda: len([s for s in engine.stages() if s.shares]) == 3)
        before = [stage.sample for stage in engine.stages()]
        for _ in range(3):
            await engine.ask()
        asked = engine.store.view().tokens
        steps = asked - 3  # the first token of each answer is the prefill's
        await engine.until(
            lambda: all(s.sample and s.sample.decode_steps == steps for s in engine.stages())
        )
        for old, stage in zip(before, engine.stages(), strict=True):
            new = stage.sample
            assert old is not None and new is not None
            assert new.busy_s > old.busy_s and new.link_s > old.link_s
            assert new.wait_s > old.wait_s
            assert 0 < new.decode_busy_s < new.busy_s
            assert new.rows == new.prefill_rows + new.decode_steps
            assert stage.decode_step_ms and stage.link_step_ms and stage.prefill_tokens_per_s
            process = psutil.Process(stage.pid)
            assert new.memory_bytes == pytest.approx(process.memory_info().rss, rel=0.2)
            assert new.weights_bytes > 0 and new.kv_bytes > 0
        view = engine.store.view()
        assert view.finished == 3 and view.running == 0
        assert len(view.ttfts_s) == 3 and max(rate or 0 for rate in view.token_rates) > 0
        # Without work every stage says so soon, instead of waiting for the next question.
        await engine.until(lambda: all(s.shares and s.shares.idle > 0.9 for s in engine.stages()))


async def test_a_stopped_worker_is_stale_and_a_dead_one_disconnected() -> None:
    async with live([3, 3]) as engine:
        await engine.until(lambda: [s.contact for s in engine.stages()] == ["live"] * 2)
        pid = engine.stages()[1].pid
        assert pid is not None
        worker = psutil.Process(pid)
        worker.send_signal(signal.SIGSTOP)
        try:
            await engine.until(lambda: [s.contact for s in engine.stages()] == ["live", "stale"])
        finally:
            worker.send_signal(signal.SIGCONT)
        await engine.until(lambda: [s.contact for s in engine.stages()] == ["live", "live"])
        worker.kill()
        await engine.until(lambda: engine.store.view().state == "recovering")
        assert "SIGKILL" in engine.store.view().reason
        await engine.until(lambda: engine.store.view().state == "ready")
        await engine.until(lambda: [s.contact for s in engine.stages()] == ["live", "live"])
        assert engine.stages()[1].pid != pid
        await engine.client.stop()
        assert [s.contact for s in engine.stages()] == ["disconnected"] * 2


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(settings([3, 3])))
    return tmp_path


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, "--telemetry-json", *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_lines_are_printed_until_as_many_as_asked_for(folder: Path) -> None:
    done = run(folder, "--telemetry-lines", "2", "--telemetry-interval", "0.6")
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert second["elapsed_s"] - first["elapsed_s"] >= 0.6
    assert first["state"] == "ready" and first["ttft_last_s"] is None
    for record in (second, *second["stages"]):
        for key, value in record.items():
            if isinstance(value, int | float):
                assert key.endswith(UNITS) or key in COUNTS, key
    assert [stage["layers"] for stage in second["stages"]] == [3, 3]
    assert {stage["memory_kind"] for stage in second["stages"]} == {"process"}
    for stage in second["stages"]:
        shares = [stage[f"{name}_share"] for name in ("busy", "wait", "link", "idle")]
        assert sum(shares) == pytest.approx(1.0, abs=0.001)


def test_a_batch_is_measured_while_it_is_answered(folder: Path) -> None:
    asked = [{"prompt": f"hello {n}", "max_tokens": 30} for n in range(20)]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    done = run(folder, "--telemetry-interval", "0.1", "--batch", "in.jsonl", "-o", "out.jsonl")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert len(answers) == 20
    tokens = sum(a["response"]["body"]["usage"]["completion_tokens"] for a in answers)
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["requests_finished"], last["requests_running"]) == (20, 0)
    assert last["tokens"] == tokens
    assert last["ttft_median_s"] > 0


def test_a_batch_goes_on_when_nobody_reads_its_telemetry(folder: Path) -> None:
    asked = [{"prompt": f"hello {n}", "max_tokens": 60} for n in range(40)]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    words = ["--telemetry-interval", "0.1", "--batch", "in.jsonl", "-o", "out.jsonl"]
    with subprocess.Popen(
        [COMMAND, "--telemetry-json", *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"{")
        process.stdout.close()
        process.stderr.read()
        assert process.wait(60) == 0
    assert len((folder / "out.jsonl").read_text().splitlines()) == 40


def test_ctrl_c_ends_it_in_order(folder: Path) -> None:
    with subprocess.Popen(
        [COMMAND, "--telemetry-json", "--telemetry-interval", "0.1"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        pids = [stage["pid"] for stage in json.loads(process.stdout.readline())["stages"]]
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(10) == 130
    assert len(pids) == 2 and not any(map(psutil.pid_exists, pids))


def test_an_engine_that_cannot_be_brought_back_ends_it_with_one_line_of_why(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    model = shutil.copytree(settings["base_model_name_or_path"], folder / "model")
    settings["base_model_name_or_path"] = str(model)
    (folder / "config.json").write_text(json.dumps(settings))
    with subprocess.Popen(
        [COMMAND, "--telemetry-json", "--telemetry-interval", "0.1"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        pid = json.loads(process.stdout.readline())["stages"][1]["pid"]
        shutil.rmtree(model)  # what takes the stage's place finds nothing to load
        psutil.Process(pid).kill()
        process.stdout.read()
        complaint = process.stderr.read()
        # By whose word comes first: that of the stage which finds no model, or its end.
        assert process.wait(10) in (2, 3)
    assert str(model) in complaint and "Traceback" not in complaint


def test_a_config_that_does_not_fit_prints_nothing_on_stdout(folder: Path) -> None:
    done = run(folder, "--stages", "1,1")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
