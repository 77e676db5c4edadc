"""Which files of a model folder hold its weights, and whether they are whole. Torch-free."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint.mcore_files import METADATA, TORCH_FILE, is_mcore, iteration_folder
from engine.checkpoint.safetensors_file import INDEX_FILE, SINGLE_FILE, read_shapes
from engine.errors import CheckpointError, shown

# As transformers looks for them: one file before shards, safetensors before pickles.
WEIGHT_FILES = (SINGLE_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")
HEAD_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a checkpoint.

    `index` maps tensor names to files where an index file does; None for a single file.
    """

    files: tuple[Path, ...]
    index: dict[str, Path] | None = None


def find_weights(path: Path) -> WeightFiles:
    """The weight files at `path`: a folder in Hugging Face's or Megatron-Core's layout, or a file.

    Raises:
        CheckpointError: there are none, the index is damaged, names a file outside the folder
            or one that is missing.
    """
    if path.is_file():
        return WeightFiles((path,))
    if is_mcore(path):
        folder = iteration_folder(path)
        if (folder / TORCH_FILE).is_file():
            return WeightFiles((folder / TORCH_FILE,))
        return WeightFiles((folder / METADATA, *sorted(folder.glob("*.distcp"))))
    for name in WEIGHT_FILES:
        found = path / name
        if found.is_file():
            return _read_index(found) if name.endswith(".index.json") else WeightFiles((found,))
    raise CheckpointError(
        f"{path}: no weight files; expected {SINGLE_FILE} or pytorch_model.bin, or their index"
    )


def _read_index(path: Path) -> WeightFiles:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: damaged: no weight_map of tensor names to files") from None
    for name in set(names.values()):
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{path}: refused: {shown(name)} is not a file of its own folder")
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path.parent / name}: missing, though {path.name} names it")
    index = {key: path.parent / name for key, name in names.items()}
    return WeightFiles(tuple(sorted(set(index.values()))), index)


def check_whole(path: Path) -> None:
    """Check that every weight file at `path` is there and not cut short.

    Raises:
        CheckpointError: naming the file.
    """
    for file in find_weights(path).files:
        if file.suffix == ".safetensors":
            read_shapes(file)
        elif file.name != METADATA and file.suffix != ".distcp":
            _check_torch_file(file)


def _check_torch_file(path: Path) -> None:
    """A torch file is a zip, whose directory comes last; before torch 1.6 it was a bare pickle."""
    with path.open("rb") as file:
        bare_pickle = file.read(1) == b"\x80"
    if not bare_pickle and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: damaged or cut short: not a whole torch file")


def check_tokenizer(folder: Path) -> None:
    """Check that `folder` holds the files of a tokenizer.

    Raises:
        CheckpointError: naming the folder and what is expected.
    """
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        raise CheckpointError(f"{folder}: no tokenizer; expected tokenizer.json or tokenizer.model")
