"""Checkpoints of a run: whole or not there, loadable at any world size, free of pickle.

    RUN/iter_0000010/checkpoint.json            where the run was and what the tensors belong to
    RUN/iter_0000010/rank_00000.safetensors     the pieces that rank 0 updates; one file a rank
    RUN/latest_checkpointed_iteration.txt       written last, so it always names a whole one

A piece is the flat run of a parameter's elements from number START on, float32, with a name
`KIND/PARAMETER@START`; KIND is `parameter` or a state of the optimizer. Together the files hold
each element once, so any rank of any grid can pick out what it needs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.safetensors_file import Entry, read_index, write_file
from engine.checkpoint.tensor_entry import read_tensor, tensor_entry
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.training.flat import Piece
from engine.training.mesh import Group
from engine.training.optimizer import Optimizer, Role, role_of

TRACKER = "latest_checkpointed_iteration.txt"
FACTS = "checkpoint.json"
PARAMETER = "parameter"
VOCABULARY = "vocabulary"
UPDATES = "updates"
RANDOM = "random/cpu"
VERSION = 1


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of itself."""

    iteration: int
    consumed_samples: int
    world_size: int
    objective: str
    heads: Mapping[str, Any]
    """What the heads are made of; has to agree with the run that loads them."""
    data: str
    """Digest of the training data."""


def name_of(iteration: int) -> str:
    """Folder of a checkpoint in its run folder."""
    return f"iter_{iteration:07}"


def save(
    run: Path,
    facts: Facts,
    optimizer: Optimizer,
    world: Group,
    *,
    vocabulary: Tensor | None,
    with_states: bool,
    with_random: bool,
) -> Path:
    """Write a checkpoint into the run folder; every rank must call this.

    It is written under another name and gets its own when it is on the disk as a whole.

    Raises:
        EngineError: on all ranks, when one could not write; what was saved before is intact.
    """
    final = run / name_of(facts.iteration)
    unfinished = run / f".{final.name}.partial"
    rank = world.index
    try:
        _together(world, partial(_make_empty, unfinished) if rank == 0 else None)
        entries = list(_entries(optimizer, with_states))
        if with_random:
            entries.append(_entry(RANDOM, torch.get_rng_state()))
        if rank == 0 and vocabulary is not None:
            entries.append(_entry(VOCABULARY, vocabulary))
        _together(world, partial(_write, unfinished / file_of(rank), entries))
        _together(world, partial(_finish, unfinished, final, facts) if rank == 0 else None)
    except EngineError as error:
        if rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise EngineError(f"{final}: not saved: {error}; {_last_good(run)}") from None
    return final


def file_of(rank: int) -> str:
    """The file of a rank's pieces."""
    return f"rank_{rank:05}.safetensors"


def _together(world: Group, work: Any) -> None:
    """Do `work` and wait for the others; EngineError on all ranks if one failed."""
    problem = ""
    try:
        if work is not None:
            work()
    except OSError as error:
        problem = error.strerror or str(error)
    if told := world.first_text(problem):
        raise EngineError(told)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _entries(optimizer: Optimizer, with_states: bool) -> list[Entry]:
    entries = []
    for piece in optimizer.owned:
        tensors = {PARAMETER: piece.value, **(optimizer.states[piece] if with_states else {})}
        for kind, tensor in tensors.items():
            entries.append(_entry(f"{kind}/{piece.name}@{piece.start}", tensor))
    if with_states:
        for role, count in optimizer.updates.items():
            entries.append(_entry(f"{UPDATES}/{role.value}", torch.tensor([count])))
    return entries


def _entry(name: str, tensor: Tensor) -> Entry:
    return tensor_entry(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _write(path: Path, entries: list[Entry]) -> None:
    for _ in write_file(path, entries):
        pass
    sync(path)


def _finish(unfinished: Path, final: Path, facts: Facts) -> None:
    """Give a checkpoint that is whole its name, then say that it is the latest."""
    text = json.dumps({"version": VERSION, **vars(facts)}, indent=2)
    (unfinished / FACTS).write_text(text + "\n", encoding="utf-8")
    sync(unfinished / FACTS)
    sync(unfinished)
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    tracker = final.with_name(TRACKER)
    new = tracker.with_name(f".{TRACKER}.partial")
    new.write_text(f"{facts.iteration}\n", encoding="utf-8")
    sync(new)
    new.replace(tracker)
    sync(final.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _last_good(run: Path) -> str:
    try:
        folder = find(run)
    except CheckpointError:
        return "there is no earlier checkpoint of this run"
    return f"the last good checkpoint is {folder}"


def find(path: Path) -> Path:
    """The folder of the latest checkpoint of a run folder, or of `path` itself if it is one.

    Raises:
        CheckpointError: there is none.
    """
    if (path / FACTS).is_file():
        return path
    tracker = path / TRACKER
    try:
        iteration = int(tracker.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: holds no checkpoint: no {TRACKER}; name a run folder v*-* or an iter_* in it"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{tracker}: cannot be read: {error}") from None
    folder = path / name_of(iteration)
    if not (folder / FACTS).is_file():
        raise CheckpointError(f"{folder}: missing, though {tracker} names it")
    return folder


class Loader:
    """A checkpoint opened for reading.

    Raises:
        CheckpointError: missing or damaged files; the file is named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = _read_facts(folder / FACTS)
        self._found: dict[tuple[str, str], list[tuple[int, int, Path, int]]] = {}
        """(kind, parameter) -> first element, element after the last, file, byte of the first."""
        self._others: dict[str, Path] = {}
        for rank in range(self.facts.world_size):
            self._index(folder / file_of(rank))

    def _index(self, path: Path) -> None:
        for name, stored in read_index(path).items():
            kind, _, rest = name.partition("/")
            parameter, at, start = rest.rpartition("@")
            if at:
                first = int(start)
                span = (first, first + stored.shape[0], path, stored.start)
                self._found.setdefault((kind, parameter), []).append(span)
            else:
                self._others.setdefault(name, path)

    def vocabulary(self) -> Tensor | None:
        """Token ids of the heads' vocabulary, int64 [n], where it is a part of the whole."""
        return self._other(VOCABULARY)

    def restore(self, optimizer: Optimizer, *, weights_only: bool, states: bool) -> None:
        """Give this rank's pieces their values, and the optimizer its states.

        With `weights_only`, base weights that the checkpoint lacks stay as they are.
        """
        with torch.no_grad():
            for piece in optimizer.pieces:
                missing = (PARAMETER, piece.name) not in self._found
                if missing and weights_only and role_of(piece.name) is Role.BASE:
                    continue
                piece.value.copy_(self._read(PARAMETER, piece))
        if states and not weights_only:
            self._restore_states(optimizer)

    def _restore_states(self, optimizer: Optimizer) -> None:
        for role in Role:
            count = self._other(f"{UPDATES}/{role.value}")
            if count is None:
                raise CheckpointError(
                    f"{self.folder}: holds no state of the optimizer; give --no_load_optim true"
                )
            optimizer.updates[role] = int(count)
        for piece, states in optimizer.states.items():
            for kind, tensor in states.items():
                tensor.copy_(self._read(kind, piece))

    def restore_random(self, world: Group) -> None:
        """Continue the random numbers, where this rank was one of as many then."""
        path = self.folder / file_of(world.index)
        if world.size == self.facts.world_size:
            stored = read_index(path).get(RANDOM)
            if stored is not None:
                torch.set_rng_state(read_tensor(path, stored))

    def _other(self, name: str) -> Tensor | None:
        path = self._others.get(name)
        return None if path is None else read_tensor(path, read_index(path)[name])

    def _read(self, kind: str, piece: Piece) -> Tensor:
        """The elements of a piece, float32 [n], from whatever files have them."""
        first, count = piece.start, piece.value.numel()
        values = np.empty(count, dtype="<f4")
        done = 0
        for start, stop, path, offset in self._found.get((kind, piece.name), ()):
            low, high = max(first, start), min(first + count, stop)
            if low < high:
                values[low - first : high - first] = np.fromfile(
                    path, dtype="<f4", count=high - low, offset=offset + 4 * (low - start)
                )
                done += high - low
        if done != count:
            raise CheckpointError(
                f"{self.folder}: {kind} of {piece.name} is missing, or is not of this shape"
            )
        return torch.from_numpy(values)


def _read_facts(path: Path) -> Facts:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("version")
        if version != VERSION:
            raise CheckpointError(f"{path}: version {version} is not supported; only {VERSION}")
        return Facts(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def check_fits(loader: Loader, facts: Facts, *, weights_only: bool) -> None:
    """Check that a checkpoint is of a run like the one that `facts` describes.

    Raises:
        ConfigError: naming the argument and both values.
    """
    theirs = loader.facts
    for name, value in facts.heads.items():
        held = theirs.heads.get(name)
        if held != value:
            raise ConfigError(f"--load {loader.folder}: has {name} {held}, this run {value}")
    if theirs.objective == facts.objective:
        return
    if not weights_only:
        raise ConfigError(
            f"--load {loader.folder}: was trained with {theirs.objective}, "
            f"this run is {facts.objective}; give --finetune true to take the weights alone"
        )
    if theirs.objective == "medusa2":
        raise ConfigError(
            f"--load {loader.folder}: its base learnt too (medusa2), "
            "so its heads do not fit a base that has not; train with medusa2"
        )
