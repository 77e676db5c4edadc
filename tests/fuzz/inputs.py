"""Damaged inputs for the fuzz tests: valid ones with their bytes or their JSON values exchanged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

ODD_BYTES = (
    b"",
    b"\0",
    b"\xff" * 8,
    b"\x1b[2J",
    b"{" * 300,
    b'"\\ud800"',
    b"9" * 40,
    b"-1",
    b"1e999",
)
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 2**64, 1e308, float("nan"), float("inf"), "", "\x1b[31m", "\ud800",
    "../../x", "x" * 5000, [], [[]], {}, {"a": None}, [1] * 50,
)  # fmt: skip


def damaged(seeds: Sequence[bytes], *, text: bool) -> st.SearchStrategy[bytes]:
    """Inputs near `seeds`; of JSON text also such in which values stand in the place of others."""
    edited = st.builds(_edited, st.sampled_from(seeds), st.lists(_edits(), min_size=1, max_size=6))
    if not text:
        return edited
    return edited | st.builds(
        _exchanged, st.sampled_from(seeds), st.lists(_exchanges(), max_size=3)
    )


def _edits() -> st.SearchStrategy[tuple[float, int, bytes]]:
    """Where (a share of the length), how many bytes go, and what comes."""
    come = st.binary(max_size=12) | st.sampled_from(ODD_BYTES)
    return st.tuples(st.floats(0, 1), st.integers(0, 12) | st.just(1 << 30), come)


def _edited(seed: bytes, edits: Sequence[tuple[float, int, bytes]]) -> bytes:
    for share, go, come in edits:
        at = int(share * len(seed))
        seed = seed[:at] + come + seed[at + go :]
    return seed


def _exchanges() -> st.SearchStrategy[tuple[int, Any]]:
    """Which value (counted through the text), and what comes in its place."""
    return st.tuples(st.integers(0, 200), st.sampled_from(ODD_VALUES))


def _exchanged(seed: bytes, exchanges: Sequence[tuple[int, Any]]) -> bytes:
    try:
        records = [json.loads(line) for line in seed.splitlines()]
        end = b"\n"
    except ValueError:  # one record over several lines
        records, end = [json.loads(seed)], b""
    for number, value in exchanges:
        places = list(_places(records))
        holder, key = places[number % len(places)]
        holder[key] = deepcopy(value)  # it may be put into itself
    return b"".join(json.dumps(record).encode() + end for record in records)


def _places(value: Any) -> Any:
    """Every place of a value within others: its holder and its key."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in list(keys):
        yield value, key
        yield from _places(value[key])
