"""Input that somebody else wrote: taken, or refused in a line; never a crash, never a hang.

A seeded sample; `python -m tests.fuzz` runs as many inputs as it is told to.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.run import fuzz
from tests.fuzz.targets import TARGETS, check

SAMPLE = 60
FOUND = Path(__file__).with_name("found")


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_input_is_taken_or_refused_in_a_line(name: str, tmp_path: Path) -> None:
    fuzz(name, SAMPLE, tmp_path, seed=1)


@pytest.mark.parametrize("path", sorted(FOUND.glob("*")), ids=lambda path: path.name)
def test_what_was_found_once_is_refused_for_good(path: Path, tmp_path: Path) -> None:
    check(TARGETS[path.name.partition(".")[0]], path.read_bytes(), tmp_path)
