"""Base model and Medusa heads written as one Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.head_layouts import check_heads
from engine.checkpoint.heads import HeadReader, head_names
from engine.checkpoint.hub import TEXT_FILES
from engine.checkpoint.mcore import McoreReader
from engine.checkpoint.reader import WeightReader, open_checkpoint
from engine.checkpoint.safetensors_file import DEFAULT_SHARD_BYTES, Entry, write_sharded
from engine.checkpoint.tensor_entry import tensor_entry
from engine.checkpoint.tokenizer import ensure_tokenizer
from engine.errors import CheckpointError
from engine.model.config import ModelConfig

HEADS = "medusa_head."


def merge(
    folder: Path,
    heads: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    max_heads: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the model in `folder` with the heads at `heads` to the new folder `output`.

    `output` holds what Medusa v1.0 puts in a model: the base model's names and `medusa_head.*`,
    with `medusa_num_heads` and `medusa_num_layers` in config.json. The architecture stays the
    base model's, so transformers loads the base from it. It appears whole or not at all.

    Args:
        dtype: of all weights; None keeps each as it is stored.
        max_heads: the first so many heads only.

    Raises:
        CheckpointError: the heads do not fit, a file is damaged, or `output` is not empty.
    """
    model = ModelConfig.from_folder(folder)
    reader = HeadReader(heads)
    check_heads(reader.spec, model, heads)
    count = min(reader.spec.num_heads, max_heads or reader.spec.num_heads)
    with new_folder(output) as unfinished:
        with open_checkpoint(folder) as base:
            entries = [*_base_entries(base, dtype), *_head_entries(reader, count, dtype)]
            write_sharded(unfinished, entries, shard_bytes=shard_bytes, written=progress)
        copy_texts(folder, unfinished)
        write_config(folder, unfinished, dtype, heads_config(count, reader.spec.num_layers))


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `output` at the end; nothing is left of a failure.

    Raises:
        CheckpointError: `output` is there and not empty, or the disk failed.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists and is not an empty folder; name a new one")
    unfinished = output.absolute().with_name(f".{output.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(output)
    except OSError as error:
        raise CheckpointError(f"{error.filename or output}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _base_entries(base: WeightReader | McoreReader, dtype: torch.dtype | None) -> Iterator[Entry]:
    for name in sorted(base.keys(), key=base.file):
        if not name.startswith(HEADS):  # heads merged earlier make way
            kind = _choose(base.dtype(name), dtype)
            yield tensor_entry(name, base.shape(name), kind, partial(base.tensor, name))


def _head_entries(heads: HeadReader, count: int, dtype: torch.dtype | None) -> Iterator[Entry]:
    for name in head_names(count, heads.spec):
        kind = _choose(heads.dtype(name), dtype)
        yield tensor_entry(name, heads.shape(name), kind, partial(heads.tensor, name))
    token_map = heads.token_map
    if token_map is not None:
        shape = tuple(token_map.shape)
        yield tensor_entry(f"{HEADS}token_map", shape, token_map.dtype, lambda: token_map)


def _choose(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Weights are converted where a dtype is wanted; integers stay as they are."""
    return wanted if wanted is not None and stored.is_floating_point else stored


def copy_texts(folder: Path, output: Path) -> None:
    """Copy tokenizer, template and settings of the model in `folder`, but not its config.json.

    Raises OSError and, where a tokenizer cannot be converted, CheckpointError.
    """
    for name in TEXT_FILES:
        if name != "config.json" and (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)
    tokenizer = ensure_tokenizer(folder)
    if tokenizer.parent != folder:
        shutil.copyfile(tokenizer, output / "tokenizer.json")


def heads_config(num_heads: int, num_layers: int) -> dict[str, int]:
    """What the config.json of a model says of heads that are merged into it."""
    return {"medusa_num_heads": num_heads, "medusa_num_layers": num_layers}


def write_config(
    folder: Path, output: Path, dtype: torch.dtype | None, more: Mapping[str, Any]
) -> None:
    """Write the config.json of the model in `folder` with the dtype and keys that are new.

    Raises OSError.
    """
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        key = "dtype" if "dtype" in values else "torch_dtype"  # transformers 5's name, and 4's
        values[key] = str(dtype).removeprefix("torch.")
    values |= more
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (output / "config.json").write_text(text, encoding="utf-8")
