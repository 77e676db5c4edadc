"""Writing to a config.json of the user: one key at a time, and nothing else changes."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from engine.errors import ConfigError

KEY = "stage_num_hidden_layers_list"
ENTRY = re.compile(rf'("{KEY}"\s*:\s*)\[[^\[\]]*\]')


def save_split(path: Path, split: Sequence[int], source: Path | None = None) -> None:
    """Write `split` as `stage_num_hidden_layers_list` to the config at `path`.

    All other keys stay as they are, order and layout included. The file is replaced in one go,
    with the mode it had; a link is followed.

    Args:
        source: the config to take the other keys from, where `path` is a new file.

    Raises:
        ConfigError: naming the file that cannot be read or written.
    """
    source = source or path
    try:
        text = source.read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: must hold one JSON object")
    try:
        _replace(path, _with_split(text, values, list(split)))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None


def _with_split(text: str, values: dict[str, object], split: list[int]) -> str:
    wanted = {**values, KEY: split}
    edited = ENTRY.sub(lambda entry: entry[1] + json.dumps(split), text, count=1)
    # Else the key is new, or what was found belongs to something else of the same name.
    if json.loads(edited) == wanted and list(json.loads(edited)) == list(wanted):
        return edited
    return json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"


def _replace(path: Path, text: str) -> None:
    target = path.resolve()
    mode = target.stat().st_mode & 0o777 if target.exists() else None
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    partial = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o644 if mode is None else mode)
        partial.replace(target)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
