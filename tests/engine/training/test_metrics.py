"""What a run writes and tells: logging.jsonl, TensorBoard, plots, stderr, the shared queue."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import zmq

from engine.protocol import TrainingStarted, TrainingStep, decode_event
from engine.training.args import parse_arguments
from engine.training.figures import Losses, Step
from engine.training.metrics import RunLog
from engine.training.plots import write_plot
from engine.training.progress import span
from engine.training.run_folder import make_run_folder
from engine.training.tensorboard import EventWriter, _checksum
from tests.engine.training.ranks import records, steps, train_here
from tests.tiny import tiny_folder


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    path = tmp_path / "rows.jsonl"
    rows = [{"query": "ask", "response": "abcdefgh"[: 3 + n % 5]} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # fmt: off
    return [
        "--model", str(tiny_folder(layers=2)), "--dataset", str(path),
        "--save", str(tmp_path / "runs"), "--split_dataset_ratio", "0.25", "--eval_iters", "1",
        "--global_batch_size", "4", "--medusa_num_heads", "2", "--train_iters", "5",
        "--log_interval", "2", "--save_interval", "4",
    ]
    # fmt: on


def test_the_run_folder_has_all_that_the_specification_names(words: list[str]) -> None:
    run = train_here(words)
    assert run.name.startswith("v0-")
    found = {path.name for path in run.iterdir()}
    assert found == {
        "args.json", "logging.jsonl", "runs", "images", "heads", "iter_0000004", "iter_0000005",
        "latest_checkpointed_iteration.txt",
    }  # fmt: skip
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "5\n"
    assert json.loads((run / "args.json").read_text())["global_batch_size"] == 4
    images = {path.name for path in (run / "images").iterdir()}
    assert images == {"loss.svg", "accuracy.svg", "learning_rate.svg"}
    (events,) = (run / "runs").iterdir()
    assert events.name.startswith("events.out.tfevents.")


def test_each_log_step_is_one_json_object(words: list[str]) -> None:
    run = train_here(words)
    logged = steps(run)
    assert [record["iteration"] for record in logged] == [2, 4, 5]
    assert [record["consumed_samples"] for record in logged] == [8, 16, 20]
    for record in logged:
        assert len(record["loss_per_head"]) == len(record["accuracy_per_head"]) == 2
        for key in ("loss", "learning_rate", "grad_norm", "tokens_per_s", "memory_bytes"):
            assert record[key] > 0
        assert record["memory_bytes_per_rank"] == [record["memory_bytes"]]
    assert logged[-1]["remaining_s"] == 0
    assert logged[0]["elapsed_s"] < logged[-1]["elapsed_s"]
    evaluated = [record for record in records(run) if "eval_loss" in record]
    assert [record["iteration"] for record in evaluated] == [4, 5]
    assert len(evaluated[0]["eval_accuracy_per_head"]) == 2


def test_a_logged_loss_is_the_mean_since_the_last(words: list[str]) -> None:
    every = steps(train_here([*words[:-4], "--log_interval", "1"]))
    (run,) = [train_here(words)]
    second = steps(run)[1]
    assert second["loss"] == pytest.approx((every[2]["loss"] + every[3]["loss"]) / 2)


def test_progress_with_the_time_left_goes_to_stderr(
    words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    train_here(words)
    told = capfd.readouterr()
    lines = told.err.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["2/5", "4/5", "5/5"]
    assert all(line.endswith(" left") for line in lines if line.startswith("step "))
    assert told.out == ""
    train_here([*words, "--logging_level", "error"])
    assert capfd.readouterr().err == ""


def test_progress_can_be_json_for_other_programs(
    words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    run = train_here([*words, "--progress", "json"])
    events = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [e["event"] for e in events if e["event"] != "note"] == [
        "step", "step", "evaluation", "step", "evaluation",
    ]  # fmt: skip
    assert [e["loss"] for e in events if e["event"] == "step"] == [s["loss"] for s in steps(run)]
    train_here([*words, "--progress", "none"])
    assert capfd.readouterr().err == ""


def test_versions_count_up(tmp_path: Path) -> None:
    (tmp_path / "v7-20250101-000000").mkdir()
    (tmp_path / "v9-notes").mkdir()
    folders = [make_run_folder(tmp_path, add_version=True, arguments={}) for _ in range(2)]
    assert [folder.name.split("-")[0] for folder in folders] == ["v8", "v9"]
    assert make_run_folder(tmp_path / "x", add_version=False, arguments={}) == tmp_path / "x"


@pytest.fixture
def queue(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[zmq.Socket[bytes]]:
    """The client's end of a shared queue, its addresses in the environment."""
    context = zmq.Context()
    pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
    for socket, variable in ((pull, "JUPITER_EVENTS"), (pub, "JUPITER_COMMANDS")):
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        monkeypatch.setenv(variable, f"tcp://127.0.0.1:{port}")
    monkeypatch.setenv("JUPITER_EPOCH", "3")
    yield pull
    context.destroy(linger=0)


def test_every_step_is_an_event_on_the_shared_queue(
    words: list[str], queue: zmq.Socket[bytes]
) -> None:
    run = train_here([*words[:-4], "--log_interval", "1"])
    events = []
    while len(events) < 6:
        assert queue.poll(5000), "events are missing"
        events.append(decode_event(queue.recv()))
    logged = steps(run)
    begin, *events = events
    assert begin is not None
    assert begin.body == TrainingStarted(run=str(run), iteration=0, total=5)
    for event, record in zip(events, logged, strict=True):
        assert event is not None
        assert (event.epoch, event.rank) == (3, 0)
        body = event.body
        assert isinstance(body, TrainingStep)
        assert (body.iteration, body.total) == (record["iteration"], 5)
        assert body.loss == record["loss"]
        assert list(body.loss_per_head) == record["loss_per_head"]
        assert list(body.accuracy_per_head) == record["accuracy_per_head"]
        assert body.memory_kind == record["memory_kind"]
        assert body.lr == record["learning_rate"]
        assert body.grad_norm == record["grad_norm"]
        assert body.remaining_s >= 0
        assert body.memory_bytes > 0


# --- TensorBoard ---------------------------------------------------------------------------------


def parse(data: bytes) -> list[tuple[int, Any]]:
    """The fields of a protocol buffer message: (number, value)."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            found.append((key >> 3, varint()))
        elif key & 7 == 2:
            size = varint()
            found.append((key >> 3, data[at : at + size]))
            at += size
        else:
            form, size = {1: ("<d", 8), 5: ("<f", 4)}[key & 7]
            found.append((key >> 3, struct.unpack(form, data[at : at + size])[0]))
            at += size
    return found


def events_of(folder: Path) -> list[dict[int, Any]]:
    (file,) = folder.iterdir()
    data, found = file.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        assert data[8:12] == _checksum(data[:8])
        assert data[12 + size : 16 + size] == _checksum(data[12 : 12 + size])
        found.append(dict(parse(data[12 : 12 + size])))
        data = data[16 + size :]
    return found


def test_the_checksum_is_the_published_one() -> None:
    # CRC-32C of "123456789" is E3069283 (RFC 3720), masked as TFRecord does.
    crc = 0xE3069283
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert _checksum(b"123456789") == struct.pack("<I", masked)


def test_scalars_are_written_as_tensorboard_reads_them(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path, queue_size=2)
    writer.add(1, {"train/loss": 2.5, "train/lr": 0.125})
    assert len(events_of(tmp_path)) == 1  # held back
    writer.add(300, {"train/loss": 1.5})
    version, first, second = events_of(tmp_path)
    assert version[3] == b"brain.Event:2"
    assert (first[2], second[2]) == (1, 300)
    values = [dict(parse(value)) for number, value in parse(first[5]) if number == 1]
    assert values == [{1: b"train/loss", 2: 2.5}, {1: b"train/lr", 2: 0.125}]


# --- plots ---------------------------------------------------------------------------------------


def test_plots_are_svg_with_a_line_per_curve(tmp_path: Path) -> None:
    path = tmp_path / "images" / "loss.svg"
    curves = {"total": [(1, 4.0), (2, 2.0), (3, float("nan"))], "head <0>": [(1, 1.0)], "none": []}
    write_plot(path, "a & b", curves)
    root = ElementTree.parse(path).getroot()
    name = "{http://www.w3.org/2000/svg}"
    lines = root.findall(f"{name}polyline")
    assert [len(line.get("points", "").split()) for line in lines] == [2, 1]
    texts = [text.text for text in root.findall(f"{name}text")]
    assert texts[0] == "a & b"
    assert texts[-2:] == ["total", "head <0>"]
    places = [tuple(map(float, p.split(","))) for p in lines[0].get("points", "").split()]
    assert places[0][0] < places[1][0]
    assert places[0][1] < places[1][1]  # a higher loss is further up


def test_a_level_curve_can_be_drawn(tmp_path: Path) -> None:
    write_plot(tmp_path / "flat.svg", "flat", {"rate": [(1, 0.001), (9, 0.001)]})
    ElementTree.parse(tmp_path / "flat.svg")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_times_are_written_for_people(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_on_a_terminal_one_line_is_rewritten(words: list[str], tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    log = RunLog(tmp_path, parse_arguments(words), total=3, has_base=False, stderr=screen)
    for iteration in (1, 2, 3):
        losses = Losses(1.0, (1.0, 2.0), (0.5, 0.25), 0)
        log.step(Step(iteration, iteration * 4, losses, 1e-3, None, 1.0, None, 100, 0.5, (9,)))
    log.close()
    assert screen.getvalue().count("\r\x1b[Kstep ") == 3
    assert "\n" not in screen.getvalue()
