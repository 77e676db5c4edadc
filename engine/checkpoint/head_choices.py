"""Trees that belong to a set of heads: `medusa_choices` in the config.json beside them.

    {"medusa_choices": {"mc_16": [[0], [0, 0], ...], "mc_63": [...]}}

They were calibrated on what these heads are right about, and go before the general presets.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import CheckpointError

KEY = "medusa_choices"
Choices = dict[str, list[list[int]]]


def read_choices(heads: Path) -> Choices:
    """The trees stored beside the heads, by name; empty where there are none.

    Raises CheckpointError when they are not lists of paths.
    """
    file = _file(heads)
    found = _values(file).get(KEY, {})
    try:
        return msgspec.convert(found, Choices)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{file}: key '{KEY}': {error}") from None


def write_choices(heads: Path, choices: Choices) -> Path:
    """Store trees beside the heads, in one go; returns the file."""
    file = _file(heads)
    partial = file.with_name(f".{file.name}.partial")
    text = json.dumps({**_values(file), KEY: choices})
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
