"""Where a Megatron-Core checkpoint is and whether it is whole. Torch-free; see mcore.py."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from engine.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
ARGUMENTS = "args.json"
"""Of the training run that made a checkpoint or a model."""
COMMON = "common.pt"
METADATA = ".metadata"
FORMAT = "metadata.json"
TORCH_FILE = Path("mp_rank_00") / "model_optim_rng.pt"
"""Of a checkpoint in one file, `ckpt_format torch`, in its iteration folder."""
ITERATION = re.compile(r"iter_(\d{7,})")


def name_of(iteration: int) -> str:
    """Folder of an iteration in its run folder."""
    return f"iter_{iteration:07}"


def is_mcore(path: Path) -> bool:
    """Whether `path` is an iteration folder, or a folder whose tracker file names one."""
    if (path / FORMAT).is_file() and (path / COMMON).is_file():
        return True
    if (path / TORCH_FILE).is_file():
        return True
    return (path / TRACKER).is_file() and _is_iteration(_latest(path))


def _is_iteration(folder: Path) -> bool:
    return (folder / FORMAT).is_file() or (folder / TORCH_FILE).is_file()


def iteration_folder(path: Path) -> Path:
    """The iteration folder at `path`: itself, or the one that its tracker file names.

    Raises:
        CheckpointError: there is none, or it is neither `torch_dist` nor `torch`.
    """
    folder = path
    if not _is_iteration(path):
        if not (path / TRACKER).is_file():
            raise CheckpointError(
                f"{path}: no checkpoint; expected {TRACKER}, or {FORMAT} of an iteration folder"
            )
        folder = _latest(path)
    if (folder / FORMAT).is_file() or not (folder / TORCH_FILE).is_file():
        check_format(folder)
    return folder


def check_format(folder: Path) -> None:
    """Check that an iteration folder says it is `torch_dist` and has its files.

    Raises:
        CheckpointError: naming the file.
    """
    path = folder / FORMAT
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        backend = facts["sharded_backend"]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; not a whole checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: damaged: names no sharded_backend") from None
    if backend != "torch_dist":
        raise CheckpointError(f"{path}: sharded_backend {backend!r} cannot be read; torch_dist can")
    for name in (METADATA, COMMON):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing; not a whole checkpoint")


def model_folder(path: Path) -> Path:
    """The folder with the model's config.json: `path`, or the one above an iteration folder.

    Raises:
        CheckpointError: neither has one.
    """
    for folder in (path, path.parent) if ITERATION.fullmatch(path.name) else (path,):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"{path}: a checkpoint without its model's config.json; name the model with --model"
    )


def _latest(path: Path) -> Path:
    """The folder that the tracker names; CheckpointError when it names none."""
    tracker = path / TRACKER
    try:
        text = tracker.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{tracker}: cannot be read: {error}") from None
    if text == "release":
        return path / text
    if not (text.isascii() and text.isdecimal()):
        raise CheckpointError(f"{tracker}: damaged: {text[:40]!r} is no iteration")
    return path / name_of(int(text))


def write_tracker(path: Path, iteration: int) -> None:
    """Have the tracker name an iteration that is on the disk; replaced in one step.

    Raises OSError.
    """
    unfinished = path / f".{TRACKER}.partial"
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(str(iteration))
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path / TRACKER)


def system_of(folder: Path) -> str | None:
    """The system message with which the model in `folder` was trained, if its args.json says so."""
    try:
        values = json.loads((folder / ARGUMENTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    system = values.get("system") if isinstance(values, dict) else None
    return system if isinstance(system, str) else None
