"""Checkpoints of torch.distributed.checkpoint (DCP): chunks of tensors by key and place.

A folder holds `.metadata`, which tells where each chunk lies, and the files `__{rank}_{n}.distcp`.
Each rank writes the chunks that it has, and reads those that it needs, however they were cut.

`.metadata` is a pickle. Here it is read by an unpickler that knows DCP's own records and nothing
else, so a file from a stranger can run no code.
"""

from __future__ import annotations

import errno
import io
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from engine.checkpoint.mcore_files import METADATA
from engine.errors import CheckpointError


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor: where it lies in the whole, and `load`, which gives it when asked."""

    key: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


def whole(key: str, tensor: Tensor) -> Chunk:
    """A tensor that is not cut."""
    shape = tuple(tensor.shape)
    return Chunk(key, shape, (0,) * len(shape), shape, tensor.dtype, lambda: tensor)


class ChunkSavePlanner(DefaultSavePlanner):
    """Plans the writing of a rank's chunks; of equal chunks on several ranks one is written.

    For `torch.distributed.checkpoint.save` and `async_save` with the state dict of `state_of`.

    objects: other values by key, written with torch.save.
    """

    def __init__(self, chunks: Sequence[Chunk], objects: Mapping[str, Any] = {}) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {(chunk.key, chunk.offsets): chunk for chunk in chunks}
        self._objects = objects

    def create_local_plan(self) -> SavePlan:
        """This rank's chunks and objects."""
        objects = [
            WriteItem(metadata.MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects
        ]
        self.plan = SavePlan([*map(_write_item, self._chunks.values()), *objects])
        return self.plan

    def lookup_object(self, index: metadata.MetadataIndex) -> Any:
        """What is written for an item; a copy that async_save made goes first."""
        if index.offset is None:
            return self._objects[index.fqn]
        chunk = self._chunks[index.fqn, tuple(index.offset)]
        staged = self.state_dict.get(_name(chunk))
        tensor = staged if isinstance(staged, Tensor) else chunk.load()
        if tuple(tensor.shape) != chunk.sizes or tensor.dtype != chunk.dtype:
            raise ValueError(f"{chunk.key}: is {tensor.dtype} {list(tensor.shape)}")
        return tensor


def state_of(chunks: Sequence[Chunk]) -> dict[str, Tensor]:
    """The chunks as a state dict, which `async_save` copies to the CPU before it returns."""
    return {_name(chunk): chunk.load() for chunk in chunks}


def _name(chunk: Chunk) -> str:
    return f"{chunk.key}@{','.join(map(str, chunk.offsets))}"


def _write_item(chunk: Chunk) -> WriteItem:
    offsets = torch.Size(chunk.offsets)
    return WriteItem(
        metadata.MetadataIndex(chunk.key, offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            metadata.ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)),
            metadata.TensorProperties(dtype=chunk.dtype),
            torch.Size(chunk.shape),
        ),
    )


def write_parts(
    folder: Path, parts: Sequence[Sequence[Chunk]], objects: Mapping[str, Any] = {}
) -> None:
    """Write a checkpoint from this process alone, a file `__{n}_0.distcp` for each part.

    One chunk is in memory at a time.

    Raises:
        OSError: the disk is full, say.
    """
    planners = [ChunkSavePlanner(part, {} if n else objects) for n, part in enumerate(parts)]
    writer = FileSystemWriter(folder)
    writer.set_up_storage_writer(True)
    for planner in planners:
        planner.set_up_planner({}, is_coordinator=True)
    plans = [writer.prepare_local_plan(planner.create_local_plan()) for planner in planners]
    plans, told = planners[0].create_global_plan(plans)
    try:
        written = [
            writer.write_data(planner.finish_plan(plan), planner).wait()
            for planner, plan in zip(planners, writer.prepare_global_plan(plans), strict=True)
        ]
        writer.finish(told, written)
    except RuntimeError as error:  # torch.save's own, over that of the file
        raise disk_error(error) from None


def disk_error(error: BaseException) -> OSError:
    """Why a file could not be written: torch.save tells that only as the cause of its own error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or OSError(errno.EIO, (str(error).splitlines() or ["cannot be written"])[0])


class DcpReader:
    """The tensors of a DCP folder by key; any part of one can be read.

    Raises:
        CheckpointError: no `.metadata`, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _Files(folder)
        found = self._files.read_metadata()
        self._files.set_up_storage_reader(found, is_coordinator=True)
        self._stored = {
            key: stored
            for key, stored in found.state_dict_metadata.items()
            if isinstance(stored, metadata.TensorStorageMetadata)
        }

    def __contains__(self, key: str) -> bool:
        return key in self._stored

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {key: tuple(stored.size) for key, stored in self._stored.items()}

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of `key` as it is stored; CheckpointError when there is no such tensor."""
        return self._find(key).properties.dtype

    def read(self, chunks: Sequence[Chunk]) -> None:
        """Fill the tensors that the chunks' `load` gives, converting their dtype.

        Raises:
            CheckpointError: a tensor is missing, of another shape, or its file is damaged.
        """
        targets, items = [], []
        for number, chunk in enumerate(chunks):
            stored = self._find(chunk.key)
            if tuple(stored.size) != chunk.shape:
                raise CheckpointError(
                    f"{self.folder}: tensor {chunk.key} is {list(stored.size)}, "
                    f"but the model needs {list(chunk.shape)}"
                )
            wanted = metadata.ChunkStorageMetadata(
                torch.Size(chunk.offsets), torch.Size(chunk.sizes)
            )
            targets.append(chunk.load())
            found = create_read_items_for_chunk_list(chunk.key, stored, [wanted])
            if sum(math.prod(item.lengths) for item in found) != math.prod(chunk.sizes):
                raise CheckpointError(f"{self.folder}: tensor {chunk.key}: a part is missing")
            items += [_Item(number, item) for item in found]
        self._fill(items, targets)

    def box(
        self,
        key: str,
        offsets: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """A part of the tensor `key`, or all of it, as it is stored; raises as `read`."""
        stored = self._find(key)
        shape = tuple(stored.size)
        wanted = shape if sizes is None else tuple(sizes)
        found = torch.empty(wanted, dtype=stored.properties.dtype)
        start = (0,) * len(shape) if offsets is None else tuple(offsets)
        self.read([Chunk(key, shape, start, wanted, found.dtype, lambda: found)])
        return found

    def _find(self, key: str) -> metadata.TensorStorageMetadata:
        if key not in self._stored:
            raise CheckpointError(f"{self.folder}: tensor {key} is missing")
        return self._stored[key]

    def _fill(self, items: Sequence[_Item], targets: Sequence[Tensor]) -> None:
        planner = _Filler({id(item.read): targets[item.target] for item in items})
        try:
            self._files.read_data(LoadPlan([item.read for item in items]), planner).wait()
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{error.filename}: missing, though {METADATA} names it"
            ) from None
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, AssertionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{self.folder}: damaged or cut short: {reason}") from None
        except pickle.UnpicklingError:
            raise CheckpointError(f"{self.folder}: holds more than tensors; refused") from None


@dataclass(frozen=True)
class _Item:
    target: int
    read: ReadItem


class _Filler(LoadPlanner):
    """Gives the reader the place that each piece goes to; other hooks have nothing to do."""

    def __init__(self, targets: Mapping[int, Tensor]) -> None:
        self._targets = targets

    def set_up_planner(self, *_: Any, **__: Any) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("only tensors are asked for")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._targets[id(read_item)].detach()
        for dim, (start, size) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(dim, start, size)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...


class _Files(FileSystemReader):
    """torch's reader, with a `.metadata` that is not trusted."""

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                found = _Unpickler(file).load()
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing; not a whole torch_dist checkpoint") from None
        except Exception as error:  # a damaged pickle can fail in any way
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{path}: damaged: {reason}") from None
        if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
            raise CheckpointError(f"{path}: damaged: describes no tensors")
        for place in found.storage_data.values():
            name = getattr(place, "relative_path", None)
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"{path}: refused: {name!r} is not a file of its own folder")
        return found


class _Inert:
    """Stands for any class that is not DCP's own: holds nothing, does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


_RECORDS: dict[str, tuple[Any, ...]] = {
    "torch.distributed.checkpoint.metadata": (
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.TensorStorageMetadata,
        metadata.TensorProperties,
        metadata.ChunkStorageMetadata,
        metadata.BytesStorageMetadata,
        metadata.StorageMeta,
        metadata._MEM_FORMAT_ENCODING,
    ),
    "torch.distributed.checkpoint.filesystem": (filesystem._StorageInfo,),
    "torch": (torch.Size,),
    "torch.serialization": (torch.serialization._get_layout,),
}
_KNOWN = {(module, record.__name__): record for module, all in _RECORDS.items() for record in all}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, name: str, /) -> Any:
        if module_name == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return _KNOWN.get((module_name, name), _Inert)
