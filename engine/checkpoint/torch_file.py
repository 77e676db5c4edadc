"""Checkpoints of `ckpt_format torch`: everything in one file, `mp_rank_00/model_optim_rng.pt`.

Names and shapes are those of a Megatron checkpoint of one rank: `model` has each layer's tensors
under its number. The optimizer's states lie beside it under `optimizer.state`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.dcp import Chunk, DcpReader
from engine.checkpoint.mcore_files import TORCH_FILE
from engine.errors import CheckpointError

_STACKED = "decoder.layers."
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_STATE = "optimizer.state."


def write_torch_file(source: DcpReader, folder: Path, common: Mapping[str, Any]) -> None:
    """Put the tensors of `source` and the values of `common` into one file.

    Raises OSError.
    """
    model: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for key in source.shapes:
        tensor, name = source.box(key), key
        place = model
        if key.startswith(_STATE):
            kind, _, name = key.removeprefix(_STATE).partition(".")
            place = states.setdefault(kind, {})
        if name.startswith(_STACKED):
            rest = name.removeprefix(_STACKED)
            place |= {f"{_STACKED}{n}.{rest}": part.clone() for n, part in enumerate(tensor)}
        else:
            place[name] = tensor
    path = folder / TORCH_FILE
    path.parent.mkdir(parents=True)
    torch.save({**common, "model": model, "optimizer": {"state": states}}, path)


def _layer(key: str) -> int:
    found = _LAYER.search(key)
    return int(found[1]) if found else -1


class TorchFile:
    """Such a file, read as `DcpReader` reads a folder.

    Raises:
        CheckpointError: it is damaged, or holds more than tensors and plain values.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / TORCH_FILE
        others = [path for path in folder.glob("mp_rank_*") if path.name != TORCH_FILE.parent.name]
        if others:
            raise CheckpointError(
                f"{folder}: {len(others) + 1} ranks wrote a part each in the format torch, and "
                "only one of a single rank can be read; convert it to torch_dist"
            )
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
            model, optimizer = found.pop("model"), found.pop("optimizer", {})
        except UnpicklingError:
            raise CheckpointError(
                f"{self.path}: holds objects that are not loaded; convert it to torch_dist"
            ) from None
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{self.path}: damaged or cut short: {reason}") from None
        self.common: dict[str, Any] = found
        self._tensors: dict[str, Tensor] = dict(model)
        for kind, states in optimizer.get("state", {}).items():
            self._tensors |= {f"{_STATE}{kind}.{name}": value for name, value in states.items()}
        self._places: dict[str, list[str]] = {}
        """Keys in the file of each tensor; of one of layers there are several, in their order."""
        for key in sorted(self._tensors, key=_layer):
            self._places.setdefault(_LAYER.sub(_STACKED, key, count=1), []).append(key)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape; those of layers are stacked, as `torch_dist` has them."""
        found = {}
        for key, places in self._places.items():
            shape = tuple(self._tensors[places[0]].shape)
            found[key] = (len(places), *shape) if _STACKED in key else shape
        return found

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of `key` as it is stored; CheckpointError when there is no such tensor."""
        return self._tensors[self._find(key)[0]].dtype

    def box(self, key: str) -> Tensor:
        """The tensor `key` as it is stored; CheckpointError when there is none."""
        parts = [self._tensors[place] for place in self._find(key)]
        return torch.stack(parts) if _STACKED in key else parts[0].clone()

    def _find(self, key: str) -> list[str]:
        if key not in self._places:
            raise CheckpointError(f"{self.path}: tensor {key} is missing")
        return self._places[key]

    def read(self, chunks: Sequence[Chunk]) -> None:
        """Fill the tensors that the chunks' `load` gives. Raises CheckpointError."""
        for chunk in chunks:
            key, offsets, target = chunk.key, chunk.offsets, chunk.load()
            if _STACKED in key:
                key = key.replace(_STACKED, f"{_STACKED}{offsets[0]}.", 1)
                offsets, target = offsets[1:], target[0]
            whole = self._tensors.get(key)
            wanted = chunk.shape if key == chunk.key else chunk.shape[1:]
            if whole is None:
                raise CheckpointError(f"{self.path}: tensor {key} is missing")
            if tuple(whole.shape) != wanted:
                raise CheckpointError(
                    f"{self.path}: tensor {key} is {list(whole.shape)}, "
                    f"but the model needs {list(wanted)}"
                )
            for dim, (start, size) in enumerate(zip(offsets, target.shape, strict=True)):
                whole = whole.narrow(dim, start, size)
            target.copy_(whole)
