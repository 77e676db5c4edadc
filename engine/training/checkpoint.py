"""Checkpoints of a run in Megatron-Core's layout: whole or not there, loadable by any ranks.

    RUN/iter_0000010/.metadata, __0_0.distcp, ...    tensors, cut as the ranks have them
    RUN/iter_0000010/common.pt                       arguments, iteration, and the run's facts
    RUN/iter_0000010/metadata.json                   names the format
    RUN/latest_checkpointed_iteration.txt            written last, so it always names a whole one

Weights have Megatron-Core's names (engine/checkpoint/mcore_names.py), those of heads their own;
optimizer states have those of their weights behind `optimizer.state.KIND.`. With `ckpt_format
torch` the same is in one file (engine/checkpoint/torch_file.py).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engine.checkpoint.dcp import Chunk, DcpReader
from engine.checkpoint.mcore import read_common
from engine.checkpoint.mcore_files import COMMON, FORMAT, TORCH_FILE, TRACKER, name_of
from engine.checkpoint.torch_file import TorchFile
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.model.config import ModelConfig
from engine.training.mesh import Group
from engine.training.optimizer import Optimizer, Role, role_of
from engine.training.parallelize import Part
from engine.training.regions import Region, Regions

STATE = "optimizer.state."
OWN = "jupiter"
"""Key of common.pt for what only this trainer needs."""
Format = Literal["torch_dist", "torch"]


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


def weight_chunks(
    optimizer: Optimizer, part: Part, regions: Regions, *, with_states: bool
) -> list[Chunk]:
    """What this rank writes: the pieces that it answers for, and their optimizer states."""
    chunks = []
    for piece in optimizer.owned:
        shard = part.shards.get(piece.name)
        found = list(regions.of(piece.name, piece.shape, shard, piece.start, piece.value.numel()))
        values = {"": piece.value}
        if with_states:
            states = optimizer.states[piece]
            values |= {f"{STATE}{kind}.": tensor for kind, tensor in states.items()}
        for prefix, value in values.items():
            chunks += [_chunk(prefix, region, value) for region in found]
    return chunks


def _chunk(prefix: str, region: Region, value: Tensor) -> Chunk:
    return Chunk(
        prefix + region.key,
        region.shape,
        region.offsets,
        region.sizes,
        value.dtype,
        lambda: value[region.elements].view(region.sizes),
    )


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def together(world: Group, work: Callable[[], None] | None) -> None:
    """Do `work` and wait for the others; EngineError on all ranks if one failed."""
    problem = ""
    try:
        if work is not None:
            work()
    except OSError as error:
        problem = error.strerror or str(error)
    if told := world.first_text(problem):
        raise EngineError(told)


def make_empty(folder: Path) -> None:
    """An empty folder, whatever was there. Raises OSError."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def publish(unfinished: Path, final: Path, iteration: int) -> None:
    """Give a checkpoint that is whole its name, then say that it is the latest. Raises OSError."""
    for path in unfinished.rglob("*"):
        sync(path)
    sync(unfinished)
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    tracker = final.with_name(TRACKER)
    new = tracker.with_name(f".{TRACKER}.partial")
    new.write_text(f"{iteration}\n", encoding="utf-8")
    sync(new)
    new.replace(tracker)
    sync(final.parent)


def last_good(run: Path) -> str:
    """A sentence for errors of saving."""
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
    if _format_of(path) is not None:
        return path
    tracker = path / TRACKER
    try:
        text = tracker.read_text(encoding="utf-8").strip()
        folder = path / (text if text == "release" else name_of(int(text)))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: holds no checkpoint: no {TRACKER}; name a run folder v*-* or an iter_* in it"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{tracker}: cannot be read: {error}") from None
    if _format_of(folder) is None:
        raise CheckpointError(f"{folder}: missing, though {tracker} names it")
    return folder


def _format_of(folder: Path) -> Format | None:
    if (folder / FORMAT).is_file():
        return "torch_dist"
    return "torch" if (folder / TORCH_FILE).is_file() else None


class Loader:
    """A checkpoint opened for reading.

    Args:
        wanted: the only format that will do; None for whichever it has.

    Raises:
        CheckpointError: missing or damaged files; the file is named.
    """

    def __init__(self, folder: Path, wanted: str | None = None) -> None:
        self.folder = folder
        has = _format_of(folder)
        if wanted is not None and has != wanted:
            raise CheckpointError(
                f"{folder}: is {has}, not {wanted}; give --ckpt_format {has}, "
                "or --auto_detect_ckpt_format true"
            )
        self.file: DcpReader | TorchFile
        if has == "torch":
            self.file = TorchFile(folder)
            self.common_file = self.file.path
            common = self.file.common
        else:
            self.file = DcpReader(folder)
            self.common_file = folder / COMMON
            common = read_common(folder)
        self._own: dict[str, Any] = common.get(OWN) or {}
        self.facts = self._read_facts(common)

    def _read_facts(self, common: Mapping[str, Any]) -> Facts:
        names = [field.name for field in dataclasses.fields(Facts)]
        facts = self._own.get("facts")
        if facts is None:  # converted weights, or another program's
            return Facts(int(common.get("iteration") or 0), 0, 0, "", {}, "")
        try:
            return Facts(**{name: facts[name] for name in names})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self.folder}: its facts cannot be read: {error}") from None

    @property
    def has_base(self) -> bool:
        """Whether it holds the base model's weights."""
        return "decoder.final_layernorm.weight" in self.file

    @property
    def has_states(self) -> bool:
        """Whether it holds the optimizer's state."""
        return "updates" in self._own

    def vocabulary(self) -> Tensor | None:
        """Token ids of the heads' vocabulary, int64 [n], where it is a part of the whole."""
        return self._own.get("vocabulary")

    def loss_scale(self) -> dict[str, float]:
        """What the loss scale had come to; empty where there was none."""
        return self._own.get("loss_scale") or {}

    def restore(
        self,
        part: Part,
        optimizer: Optimizer,
        config: ModelConfig,
        *,
        weights_only: bool,
        states: bool,
    ) -> None:
        """Give this rank's parameters their values, and the optimizer its states.

        Base weights that the checkpoint lacks stay as they are where they do not learn, and with
        `weights_only` always; so do heads with the latter, where it has none.

        Raises:
            CheckpointError: a tensor is missing, of another shape or damaged.
        """
        regions = Regions(config)
        learnt = {piece.name for piece in optimizer.pieces}
        chunks: list[Chunk] = []
        for name, parameter in part.parameters().items():
            shape, shard = tuple(parameter.shape), part.shards.get(name)
            found = list(regions.of(name, shape, shard, 0, parameter.numel()))
            optional = weights_only or (role_of(name) is Role.BASE and name not in learnt)
            if optional and not all(region.key in self.file for region in found):
                continue
            flat = parameter.data.view(-1)
            chunks += [_chunk("", region, flat) for region in found]
        if states and not weights_only:
            chunks += self._state_chunks(part, optimizer, regions)
        with torch.no_grad():
            self.file.read(chunks)

    def _state_chunks(self, part: Part, optimizer: Optimizer, regions: Regions) -> list[Chunk]:
        if not self.has_states:
            raise CheckpointError(
                f"{self.folder}: holds no state of the optimizer; give --no_load_optim true, "
                "or --finetune true to begin at step 0"
            )
        for role in Role:
            optimizer.updates[role] = int(self._own["updates"][role.value])
        chunks = []
        for piece, states in optimizer.states.items():
            shard = part.shards.get(piece.name)
            for region in regions.of(
                piece.name, piece.shape, shard, piece.start, piece.value.numel()
            ):
                chunks += [
                    _chunk(f"{STATE}{kind}.", region, tensor) for kind, tensor in states.items()
                ]
        return chunks

    def restore_random(self, world: Group) -> None:
        """Continue the random numbers: this rank's, or rank 0's where there were other ranks."""
        states = self._own.get("random")
        if states is not None:
            same = world.size == self.facts.world_size
            # A copy: torch takes no state that begins within another tensor's memory.
            torch.set_rng_state(states[world.index if same else 0].clone())


def check_fits(loader: Loader, facts: Facts, *, weights_only: bool) -> None:
    """Check that a checkpoint is of a run like the one that `facts` describes.

    Raises:
        ConfigError: naming the argument and both values.
        CheckpointError: it is of no run, and its run was to go on.
    """
    theirs = loader.facts
    if not theirs.objective:
        if not weights_only:
            raise CheckpointError(
                f"{loader.common_file}: tells of no run that could go on; "
                "give --finetune true to take the weights alone"
            )
        return
    if theirs.heads and facts.heads:
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
    if theirs.objective == "medusa2" and facts.objective == "medusa1":
        raise ConfigError(
            f"--load {loader.folder}: its base learnt too (medusa2), "
            "so its heads do not fit a base that has not; train with medusa2"
        )
