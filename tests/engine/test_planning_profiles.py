"""Profile files: what is read back, and one line for each thing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.planning.profiles import LinkProfile, read_profile, write_profile

DEVICE = {"name": "board", "rows": [1, 64], "layer_ms": [[1.0, 4.0]]}
LINK = {"latency_ms": 0.2, "mbit_per_s": 100}
GOOD: dict[str, Any] = {"devices": [DEVICE, DEVICE], "links": [LINK, LINK]}


def written(folder: Path, values: Any) -> Path:
    path = folder / "profile.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def test_a_profile_is_read_and_written_the_same(tmp_path: Path) -> None:
    profile = read_profile(written(tmp_path, GOOD))
    assert profile.devices[0].layer_s(1, 0) == pytest.approx(0.001)
    assert profile.devices[0].layer_s(22, 500) == pytest.approx(0.002)  # between, any context
    assert profile.devices[0].layer_s(127, 0) == pytest.approx(0.007)  # as steep behind the last
    assert profile.hosts == ["#0", "#1"]  # machines of their own
    again = tmp_path / "new" / "again.json"
    write_profile(again, profile)
    assert read_profile(again) == profile


def test_context_lies_between_what_was_measured(tmp_path: Path) -> None:
    device = {**DEVICE, "contexts": [100, 300], "layer_ms": [[1.0, 4.0], [2.0, 8.0]]}
    at = read_profile(written(tmp_path, {"devices": [device]})).devices[0]
    found = [at.layer_s(1, context) for context in (0, 100, 200, 300, 500)]
    assert found == pytest.approx([0.001, 0.001, 0.0015, 0.002, 0.003])


def test_bandwidth_is_in_bits() -> None:
    link = LinkProfile(latency_ms=1.0, mbit_per_s=100.0)
    assert link.transfer_s(125_000) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("{", ["not JSON"]),
        ({"devices": []}, ["devices", "length >= 1"]),
        ({**GOOD, "links": [LINK]}, ["links", "there are 1", "one for each of 2"]),
        ({"devices": [DEVICE], "links": [LINK]}, ["links", "none for one device"]),
        ({"devices": [{**DEVICE, "speed": 3}]}, ["devices[0]: ", "unknown field `speed`"]),
        ({"devices": [{**DEVICE, "rows": [0, 64]}]}, ["devices[0].rows[0]", ">= 1"]),
        ({"devices": [{**DEVICE, "rows": [64, 1]}]}, ["devices[0].rows", "[64, 1] must ascend"]),
        ({"devices": [{**DEVICE, "layer_ms": [[1.0]]}]}, ["devices[0].layer_ms", "2 numbers"]),
        ({"devices": [{**DEVICE, "contexts": [0, 9]}]}, ["devices[0].layer_ms", "2 contexts"]),
        ({"devices": [{**DEVICE, "layer_ms": [[1.0, -4.0]]}]}, ["layer_ms", "> 0"]),
        ({"devices": [{**DEVICE, "judge_ms": [1.0, 2.0]}]}, ["devices[0]", "each of judge_nodes"]),
        ({"devices": [{**DEVICE, "slowdown": 0.5}]}, ["slowdown", ">= 1"]),
        ({**GOOD, "version": 2}, ["version", "2"]),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, values: Any, words: list[str]) -> None:
    path = written(tmp_path, values)
    with pytest.raises(ConfigError) as error:
        read_profile(path)
    text = str(error.value)
    assert "\n" not in text
    for word in [str(path), *words]:
        assert word in text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read: No such file"):
        read_profile(tmp_path / "none.json")
