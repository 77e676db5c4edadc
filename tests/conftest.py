"""Options, and the default model, which is fetched into the cache once a machine."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--full` runs the long tests with all their cases instead of a seeded sample."""
    parser.addoption("--full", action="store_true", help="run every case of the long tests")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to run every case of a long test."""
    return bool(request.config.getoption("--full"))


@functools.cache
def _default_model() -> Path | str:
    from engine.checkpoint.sources import fetch
    from engine.config import load_config
    from engine.errors import JupiterError

    config = load_config(str(Path(__file__).parent.parent / "config.json"))
    try:
        return fetch(config.base_model_name_or_path, lambda line: None)
    except JupiterError as error:
        return str(error)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """Folder of the default config's model; skips where it cannot be had."""
    found = _default_model()
    if isinstance(found, str):
        pytest.skip(f"the default model cannot be fetched here: {found}")
    return found
