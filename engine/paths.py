"""Where Jupiter keeps what it stores: models in the cache folder, logs in the state folder."""

from __future__ import annotations

import os
from errno import ENOTDIR
from os import strerror
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Folder of fetched and converted models (`JUPITER_CACHE_DIR` overrides it)."""
    return Path(os.environ.get("JUPITER_CACHE_DIR") or platformdirs.user_cache_dir("jupiter"))


def state_dir() -> Path:
    """Folder of logs and other state (`JUPITER_STATE_DIR` overrides it)."""
    return Path(os.environ.get("JUPITER_STATE_DIR") or platformdirs.user_state_dir("jupiter"))


def make_private(folder: Path) -> Path:
    """Make `folder` and the folders above it that are missing, for their owner's eyes only.

    What is there already keeps its mode. Raises OSError.
    """
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(ENOTDIR, strerror(ENOTDIR), str(folder))
    return folder
