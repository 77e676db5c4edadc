"""Models and heads on the Hugging Face hub, kept in the hub client's own cache. Torch-free."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from engine.checkpoint.weight_files import HEAD_FILES, check_tokenizer, check_whole
from engine.errors import CheckpointError

TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
SAFETENSORS = r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
PICKLES = r"pytorch_model(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index\.json"


def cached_snapshot(repo: str) -> Path | None:
    """The folder of a model, or of heads, that was fetched whole before; asks no server."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", *HEAD_FILES):
        found = try_to_load_from_cache(repo, name)
        if isinstance(found, str):
            folder = Path(found).parent
            return folder if _is_whole(folder) else None
    return None


def _is_whole(folder: Path) -> bool:
    if any((folder / name).is_file() for name in HEAD_FILES):
        return True
    try:
        check_whole(folder)
        check_tokenizer(folder)
    except CheckpointError:
        return False  # a download that was broken off
    return True


def choose_files(names: Iterable[str]) -> list[str]:
    """The files of a hub repository to bring: configs, tokenizer and one set of weights.

    Medusa heads of their own kind go before a model's weights, safetensors before pickles. Empty
    when there are no weights among `names`.
    """
    names = set(names)
    for pattern in ("|".join(map(re.escape, HEAD_FILES)), SAFETENSORS, PICKLES):
        weights = sorted(name for name in names if re.fullmatch(pattern, name))
        if weights:
            return [*(name for name in TEXT_FILES if name in names), *weights]
    return []


def download(repo: str, progress: Callable[[str], None]) -> Path:
    """Bring the chosen files of `repo` into the hub's cache and return their folder.

    Raises:
        CheckpointError: no such model, no permission, no connection, or nothing to load in it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        siblings = HfApi().model_info(repo).siblings or []
        names = choose_files(file.rfilename for file in siblings)
        if not names:
            raise CheckpointError(
                f"{repo}: nothing on the hub that Jupiter can load: "
                "no model.safetensors, pytorch_model.bin or medusa_lm_head file"
            )
        bar = _reporting_bar(repo, progress)
        return Path(snapshot_download(repo, allow_patterns=names, tqdm_class=bar))
    except CheckpointError:
        raise
    except GatedRepoError:
        problem = "gated on the Hugging Face hub; accept its terms there and run `hf auth login`"
    except RepositoryNotFoundError:
        problem = (
            "no such folder here and no such model on the Hugging Face hub "
            "(a private model needs `hf auth login`)"
        )
    except Exception as error:  # which HTTP library raises here depends on the hub client's version
        lines = str(error).strip().splitlines() or [type(error).__name__]
        problem = f"no such folder here, and the Hugging Face hub did not deliver it: {lines[0]}"
    raise CheckpointError(f"{repo}: {problem}")


def _reporting_bar(repo: str, progress: Callable[[str], None]) -> Any:
    """A progress bar class that reports bytes to `progress` and draws nothing."""
    from huggingface_hub.utils.tqdm import tqdm

    told = ""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.update(file=io.StringIO(), mininterval=1.0, disable=False)
            super().__init__(*args, **kwargs)

        def display(self, *_: Any, **__: Any) -> None:
            nonlocal told
            if self.unit != "B" or not self.n:
                return  # the bar that counts files
            total = f" of {self.total / 1e6:.0f}" if self.total else ""
            message = f"downloading {repo}: {self.n / 1e6:.0f}{total} MB"
            if message != told:
                told = message
                progress(message)

    return Bar
