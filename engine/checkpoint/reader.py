"""Lazy reading of a checkpoint's tensors: safetensors and torch files, single and in shards.

Megatron-Core's folders are read by engine/checkpoint/mcore.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.checkpoint.mcore_files import is_mcore
from engine.checkpoint.safetensors_file import read_index
from engine.checkpoint.tensor_entry import dtype_of, read_tensor
from engine.checkpoint.weight_files import find_weights
from engine.errors import CheckpointError

if TYPE_CHECKING:
    from engine.checkpoint.mcore import McoreReader


class WeightReader:
    """The tensors of one checkpoint by name.

    Only tensors that are asked for are read. One file is open at a time, so ask in the order of
    the files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = find_weights(path)
        self._open: tuple[Path, _File] | None = None
        self._index: dict[str, Path]
        if found.index is None:
            (file,) = found.files
            self._index = dict.fromkeys(self._file(file).shapes, file)
        else:
            self._index = found.index

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open = None

    def __contains__(self, key: str) -> bool:
        return key in self._index

    def keys(self) -> list[str]:
        """The tensors' names."""
        return list(self._index)

    def file(self, key: str) -> Path:
        """The file that holds `key`; CheckpointError when there is no such tensor."""
        if key not in self._index:
            raise CheckpointError(f"{self.path}: tensor {key} is missing")
        return self._index[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of `key`; CheckpointError as for `tensor`."""
        path = self.file(key)
        shapes = self._file(path).shapes
        if key not in shapes:
            raise CheckpointError(f"{path}: tensor {key} is missing, though the index names it")
        return shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of `key` as it is stored; CheckpointError as for `tensor`."""
        self.shape(key)
        return self._file(self.file(key)).dtype(key)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {key: self.shape(key) for key in sorted(self._index, key=self.file)}

    def tensor(self, key: str) -> Tensor:
        """The tensor `key` as it is stored, on the CPU and in memory of its own.

        Raises:
            CheckpointError: it is missing, or its file is missing, cut short or not loadable;
                the message names the file.
        """
        self.shape(key)
        return self._file(self.file(key)).tensor(key)

    def _file(self, path: Path) -> _File:
        if self._open is None or self._open[0] != path:
            self._open = None  # let go of the last one first
            self._open = (path, _File(path))
        return self._open[1]


class _File:
    """One opened weight file."""

    def __init__(self, path: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]]
        self.dtype: Callable[[str], torch.dtype]
        self.tensor: Callable[[str], Tensor]
        if path.suffix == ".safetensors":
            index = read_index(path)
            self.shapes = {key: stored.shape for key, stored in index.items()}
            self.dtype = lambda key: dtype_of(path, index[key])
            self.tensor = lambda key: read_tensor(path, index[key])
        else:
            tensors = _load_torch_file(path)
            self.shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            self.dtype = lambda key: tensors[key].dtype
            # Copied out of the mapped file, so that the file can be let go.
            self.tensor = lambda key: tensors[key].clone()


def _load_torch_file(path: Path) -> dict[str, Tensor]:
    """A state dict saved by torch.save, with tensors only and nothing that could run code."""
    try:
        try:
            values: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            # Files from before torch 1.6 are no zip archives and cannot be mapped.
            values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except UnpicklingError:
        raise CheckpointError(
            f"{path}: damaged, or holds more than plain tensors, which Jupiter does not load"
        ) from None
    except Exception as error:  # a damaged pickle fails in any way at all, even IndexError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: damaged or cut short: {reason}") from None
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise CheckpointError(f"{path}: must hold tensors by name, and nothing else")
    return values


def open_checkpoint(path: Path) -> WeightReader | McoreReader:
    """Open a model folder in Hugging Face's or Megatron-Core's layout, or a single weight file.

    Raises:
        CheckpointError: no weights, a damaged index, or a file that is missing or damaged.
    """
    if not is_mcore(path):
        return WeightReader(path)
    # torch.distributed.checkpoint takes a third of the time of importing torch: not at each start.
    from engine.checkpoint.mcore import McoreReader

    return McoreReader(path)
