"""Text codecs of tiny tokenizers, and data files."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.text import TextCodec
from tests.engine.training.ranks import Ranks
from tests.tiny import CHAT_TEMPLATE, character_tokenizer


@pytest.fixture(autouse=True)
def token_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are kept in a folder of the test's own."""
    monkeypatch.setattr("engine.training.tokenizing.cache_dir", lambda: tmp_path / "cache")


@pytest.fixture
def codec(tmp_path: Path) -> TextCodec:
    """Each character is a token; turns end with <|im_end|>."""
    folder = tmp_path / "model"
    folder.mkdir()
    character_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return TextCodec(folder, folder / "tokenizer.json", [])


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes records, one a line."""

    def write(*records: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes to train in."""
    ranks = Ranks()
    yield ranks
    ranks.close()


SmallDisk = Callable[[Any, str, int], AbstractContextManager[None]]


@pytest.fixture
def small_disk() -> SmallDisk:
    """Within `small_disk(owner, name, size)`, what that function writes meets a full disk.

    The kernel itself refuses to let a file become larger than `size` bytes.
    """

    @contextmanager
    def limited(owner: Any, name: str, size: int) -> Iterator[None]:
        original = getattr(owner, name)

        def write(*args: Any) -> Any:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            try:
                return original(*args)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, write)
            yield

    return limited
