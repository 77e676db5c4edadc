"""`jupiter bench ui`, short: the real workbench in a terminal of its own, judged from outside."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.e2e.terminal import JUPITER_TUI
from tui.bench_ui import worst_delay

JUPITER = str(Path(JUPITER_TUI).with_name("jupiter"))


def test_the_last_line_tells_lag_load_and_delay(tmp_path: Path) -> None:
    done = subprocess.run(
        [JUPITER, "bench", "ui", "--code-lines", "20", "--rate", "400"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert list(told) == ["bench", "lag_p50_ms", "lag_p99_ms", "cpu_share", "behind_s"]
    assert told["bench"] == "ui"
    assert 0 <= told["lag_p50_ms"] <= told["lag_p99_ms"]
    assert 0 < told["cpu_share"] < 4
    assert 0 < told["behind_s"] < 30
    assert not list(tmp_path.iterdir())


def test_a_bench_that_is_not_there_is_one_line_and_exit_code_2() -> None:
    done = subprocess.run([JUPITER, "bench", "disk"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("jupiter bench: name what to measure: batch, decode, ")
    assert line.endswith(", ui")


def test_a_mark_that_was_scrolled_over_was_seen_when_the_next_one_was() -> None:
    pieces = ["m00001", " a", " m00002", " m00003"]
    seen = {"m00001": 10.1, "m00003": 12.0}
    # Arrivals at 10, 11 and 11.5 s; the second mark was only passed over at 12 s.
    assert worst_delay(pieces, 10.0, 2.0, seen) == pytest.approx(1.0)
    assert worst_delay(pieces, 10.0, 2.0, {**seen, "m00002": 11.2}) == pytest.approx(0.5)
