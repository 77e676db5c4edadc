"""What is known of a set of heads' acceptance: `medusa_acceptance` in the config.json beside them.

    {"medusa_acceptance": {"seen": [2946, ...], "hits": [[1633, ...], ...],
                           "nodes": [[[0], 1633], [[0, 0], 871], ...]}}

They are the counts of engine.decoding.acceptance, of steps through the answers that `jupiter medusa
eval --calibrate` had the model write. Any beginning of `nodes` is the best tree of its size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engine.decoding.acceptance import CANDIDATES, Acceptance
from engine.decoding.tree import PRESETS
from engine.errors import CheckpointError

KEY = "medusa_acceptance"
Choices = dict[str, list[list[int]]]
Count = Annotated[float, Meta(ge=0)]
Rank = Annotated[int, Meta(ge=0, lt=CANDIDATES)]
Ranks = Annotated[list[Count], Meta(min_length=CANDIDATES, max_length=CANDIDATES)]


class _Stored(msgspec.Struct):
    seen: Annotated[list[Count], Meta(min_length=1)]
    hits: list[Ranks]
    nodes: list[tuple[Annotated[list[Rank], Meta(min_length=1)], Count]]


def read_acceptance(heads: Path) -> Acceptance | None:
    """The counts stored beside the heads; None where there are none.

    Raises CheckpointError when they are not what `write_acceptance` writes.
    """
    file = _file(heads)
    found = _values(file).get(KEY)
    if found is None:
        return None
    try:
        stored = msgspec.convert(found, _Stored)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{file}: key '{KEY}': {error}") from None
    nodes = tuple((tuple(path), count) for path, count in stored.nodes)
    _check(file, stored, dict(nodes))
    return Acceptance(tuple(stored.seen), tuple(map(tuple, stored.hits)), nodes)


def _check(file: Path, stored: _Stored, nodes: dict[tuple[int, ...], float]) -> None:
    if len(stored.hits) != len(stored.seen):
        raise CheckpointError(f"{file}: key '{KEY}': seen and hits must name as many heads")
    known: dict[tuple[int, ...], float] = {(): stored.seen[0]}
    for path, count in nodes.items():
        if len(path) > len(stored.seen) or not 0 < count <= known.get(path[:-1], 0):
            raise CheckpointError(
                f"{file}: key '{KEY}': node {list(path)} must follow {list(path[:-1])}, "
                "which is counted as often at least"
            )
        known[path] = count


def best_choices(acceptance: Acceptance | None) -> Choices:
    """The best trees of the presets' sizes, by the presets' names; none where nothing was counted.

    The expected number of accepted tokens is the sum of the nodes' frequencies, and no node is
    more frequent than its parent; so the most frequent nodes are the best tree of that size.
    """
    paths = [list(path) for path, _ in acceptance.paths] if acceptance else []
    return {name: paths[: len(preset)] for name, preset in PRESETS.items()} if paths else {}


def write_acceptance(heads: Path, acceptance: Acceptance) -> Path:
    """Store counts beside the heads, in one go; returns the file."""
    file = _file(heads)
    partial = file.with_name(f".{file.name}.partial")
    stored = msgspec.to_builtins(_Stored(acceptance.seen, acceptance.hits, acceptance.nodes))  # type: ignore[arg-type]
    text = json.dumps({**_values(file), KEY: stored})
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(file)
    return file


def _file(heads: Path) -> Path:
    return (heads if heads.is_dir() else heads.parent) / "config.json"


def _values(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: must hold one JSON object")
    return values
