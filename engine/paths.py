"""Where Jupiter keeps what it stores: models in the cache folder, logs in the state folder."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Folder of fetched and converted models (`JUPITER_CACHE_DIR` overrides it)."""
    return Path(os.environ.get("JUPITER_CACHE_DIR") or platformdirs.user_cache_dir("jupiter"))


def state_dir() -> Path:
    """Folder of logs and other state (`JUPITER_STATE_DIR` overrides it)."""
    return Path(os.environ.get("JUPITER_STATE_DIR") or platformdirs.user_state_dir("jupiter"))
