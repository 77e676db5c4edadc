"""The folder of one run: `save/v{N}-{YYYYMMDD-HHMMSS}/` with args.json and what the run writes."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

VERSION = re.compile(r"v(\d+)-\d{8}-\d{6}")


def make_run_folder(save: Path, *, add_version: bool, arguments: Mapping[str, Any]) -> Path:
    """Make the folder and write `arguments` to its args.json.

    Raises:
        ConfigError: it cannot be made or written.
    """
    folder = save
    try:
        save.mkdir(parents=True, exist_ok=True)
        if add_version:
            folder = _next_version(save)
        text = json.dumps(arguments, indent=2, ensure_ascii=False)
        (folder / "args.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--save {save}: cannot be written: {error.strerror}") from None
    return folder


def _next_version(save: Path) -> Path:
    while True:
        matches = [VERSION.fullmatch(child.name) for child in save.iterdir()]
        number = 1 + max((int(match[1]) for match in matches if match), default=-1)
        folder = save / f"v{number}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue  # another run was faster
        return folder
