"""What a stage measures of itself: its time, its memory, and that it is heard while it works."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engine.model.kv_cache import KVStore
from engine.pipeline import telemetry
from engine.pipeline.memory import cgroup_limits, memory_total_bytes, weights_bytes
from engine.pipeline.meter import StageMeter
from engine.pipeline.telemetry import TelemetrySender

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_every_moment_is_booked_on_one_activity() -> None:
    clock = Clock()
    meter = StageMeter(clock)
    clock.now += 1
    with meter.during("wait"):
        clock.now += 2
        with meter.during("link"):
            clock.now += 4
        clock.now += 8
    clock.now += 16
    with meter.during("idle"):
        clock.now += 32
    spent = meter.spent()
    assert (spent.busy, spent.wait, spent.link, spent.idle) == (17, 10, 4, 32)


def test_a_span_that_goes_on_is_counted_up_to_now() -> None:
    clock = Clock()
    meter = StageMeter(clock)
    with meter.during("idle"):
        clock.now += 5
        assert meter.spent().idle == 5
        clock.now += 1
        assert meter.spent().idle == 6


def test_an_activity_ends_with_an_error_as_well() -> None:
    clock = Clock()
    meter = StageMeter(clock)
    with pytest.raises(RuntimeError), meter.during("wait"):
        clock.now += 3
        raise RuntimeError("the neighbour is gone")
    clock.now += 1
    assert meter.spent().wait == 3
    assert meter.spent().busy == 1


def test_decode_steps_and_prefill_are_counted_apart() -> None:
    meter = StageMeter()
    meter.count(64, decode=False, began=1.0, ended=1.5, points=[0])
    meter.count(4, decode=True, began=2.0, ended=2.25, points=[0])
    meter.count_judging(decode=True, began=2.25, ended=2.375)
    assert (meter.steps, meter.rows) == (2, 68)
    assert (meter.prefill_rows, meter.prefill_busy_s) == (64, 0.5)
    assert (meter.decode_steps, meter.decode_busy_s) == (1, 0.375)
    assert meter.decode_judge_s == 0.125


def stage() -> Any:
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    model["b"].weight = model["a"].weight
    return SimpleNamespace(
        model=model,
        device=CPU,
        meter=StageMeter(),
        store=KVStore(2, 1, 16, 4, dtype=torch.float32, device=CPU),
        forward=SimpleNamespace(packed_bytes=0, progress=0),
        patience_s=2.0,
    )


def test_tied_weights_count_once_and_packed_ones_too() -> None:
    subject = stage()
    assert weights_bytes(subject) == 8 * 8 * 4
    subject.forward.packed_bytes = 100
    assert weights_bytes(subject) == 8 * 8 * 4 + 100


def test_a_stage_is_heard_while_its_thread_is_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "TELEMETRY_INTERVAL_S", 0.01)
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    subject = stage()
    threads = set(threading.enumerate())
    with subject.meter.during("wait"), TelemetrySender(subject, heard.put):
        first, second = heard.get(timeout=10), heard.get(timeout=10)
        assert second.wait_s > first.wait_s
        assert second.busy_s == pytest.approx(first.busy_s)
        subject.store.find(0)
        while (sample := heard.get(timeout=10)).kv_bytes == 0:
            pass
    assert set(threading.enumerate()) == threads
    assert sample.kv_bytes == 2 * 2 * 16 * 4 * 4
    assert sample.weights_bytes == 256
    assert sample.layers == 2
    assert sample.memory_kind == "process" and sample.device == "cpu"
    assert 0 < sample.memory_bytes < sample.memory_total_bytes


def test_the_limit_of_a_control_group_counts_and_those_around_it(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n")
    root = tmp_path / "root"
    (root / "outer" / "inner").mkdir(parents=True)
    (root / "outer" / "memory.max").write_text("1000\n")
    (root / "outer" / "inner" / "memory.max").write_text("max\n")
    assert cgroup_limits(root, membership) == [1000]
    (root / "outer" / "inner" / "memory.max").write_text("800\n")
    assert sorted(cgroup_limits(root, membership)) == [800, 1000]


def test_the_older_kind_of_control_groups_is_read_too(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("5:cpu,cpuacct:/x\n4:memory:/box\n")
    (tmp_path / "memory" / "box").mkdir(parents=True)
    (tmp_path / "memory" / "box" / "memory.limit_in_bytes").write_text("4096\n")
    assert cgroup_limits(tmp_path, membership) == [4096]


def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path, tmp_path / "none") == []
    assert memory_total_bytes(CPU) > 0
