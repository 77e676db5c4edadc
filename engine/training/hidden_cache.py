"""Hidden states of a frozen base on disk, so that epochs over the heads cost only the heads.

    ROOT/NAME-KEY/shard_00000.safetensors     `hidden` [rows, hidden_size] of consecutive samples

Only rows that some head learns from are kept. KEY covers the model's files, the tokens and which
of them count, so nothing else can be read by mistake. A shard appears whole, and a run that was
stopped goes on with the next one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.cache import identity
from engine.checkpoint.safetensors_file import read_index, write_file
from engine.checkpoint.tensor_entry import tensor_entry
from engine.checkpoint.weight_files import find_weights
from engine.errors import EngineError
from engine.paths import cache_dir
from engine.training.batch import make_batch, needed_rows
from engine.training.checkpoint import sync
from engine.training.int8_base import Int8Base
from engine.training.mesh import Mesh
from engine.training.pipeline import Pipeline
from engine.training.reading import LazySamples, RowStream
from engine.training.template import Sample
from engine.training.tokenizing import StoredSamples

HIDDEN = "hidden"
SHARD_TOKENS = 16_384
FORWARD_TOKENS = 2_048
"""Tokens of one forward while the cache is filled."""
# Behind a norm no value is above sqrt(width) times the norm's weight, so float16 is wide enough,
# and it is eight times as fine as bfloat16.
DTYPE = torch.float16


class HiddenCache:
    """The normed hidden states of `samples`, of all rows that losses at `distances` look at."""

    def __init__(
        self, folder: Path, samples: Sequence[Sample], distances: Sequence[int], width: int
    ) -> None:
        self.folder = folder
        self.samples = samples
        self.distances = distances
        self.width = width
        self.shards = list(_cut([len(sample) for sample in samples], SHARD_TOKENS))
        self._place: dict[Sample, tuple[int, int, int]] = {}
        """Shard of each sample, and its first row there and the one after its last."""
        self._rows: list[int] = []
        for shard, span in enumerate(self.shards):
            at = 0
            for sample in samples[span.start : span.stop]:
                count = int(needed_rows(sample.targets, distances).sum())
                self._place[sample] = shard, at, at + count
                at += count
            self._rows.append(at)
        self._open: dict[int, np.ndarray] = {}

    def fill(
        self,
        pipeline: Pipeline,
        mesh: Mesh,
        progress: Callable[[int, int], None],
        int8: Int8Base | None = None,
    ) -> None:
        """Compute what is not there yet, by `int8` where given; every rank must call this.

        The replicas share the work. `progress` is called with the shards done and their total.

        Raises:
            EngineError: a shard cannot be written, or one of another machine cannot be seen.
        """
        missing = self._missing(mesh)
        for done, shard in enumerate(missing[mesh.replica :: mesh.dp]):
            progress(len(self.shards) - len(missing) + done * mesh.dp, len(self.shards))
            self._compute(pipeline, shard, int8)
        mesh.world.wait()
        if missing and self._missing(mesh):
            raise EngineError(
                f"{self.folder}: not all ranks see the hidden states that were written there; "
                "--cache_hidden_states must name a folder that all machines share"
            )
        progress(len(self.shards), len(self.shards))

    def _missing(self, mesh: Mesh) -> list[int]:
        """Shards that some rank of the last stage does not find."""
        absent = torch.zeros(len(self.shards), dtype=torch.uint8)
        if mesh.last:
            absent[:] = torch.tensor([not self._file(s).exists() for s in range(len(self.shards))])
        return mesh.world.max_(absent).nonzero().flatten().tolist()

    def _file(self, shard: int) -> Path:
        return self.folder / f"shard_{shard:05}.safetensors"

    def _compute(self, pipeline: Pipeline, shard: int, int8: Int8Base | None) -> None:
        span = self.shards[shard]
        samples = self.samples[span.start : span.stop]
        parts = [
            samples[part.start : part.stop]
            for part in _cut([len(sample) for sample in samples], FORWARD_TOKENS)
        ]
        kept: list[Tensor] = []

        def keep(index: int, hidden: Tensor) -> None:
            masks = [needed_rows(sample.targets, self.distances) for sample in parts[index]]
            needed = torch.from_numpy(np.concatenate(masks)).to(hidden.device)
            kept.append(hidden[needed].to("cpu", DTYPE))

        if int8 is not None:
            int8.forward(parts, keep)
        else:
            pipeline.forward([make_batch(part, pipeline.device) for part in parts], keep)
        if pipeline.mesh.last:
            try:
                self._write(shard, torch.cat(kept))
            except OSError as error:
                raise EngineError(
                    f"{self.folder}: hidden states cannot be kept: {error.strerror}"
                ) from None

    def _write(self, shard: int, hidden: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Another run may be filling the same folder.
        unfinished = self.folder / f".shard_{shard:05}.{os.getpid()}.partial"
        try:
            for _ in write_file(
                unfinished, [tensor_entry(HIDDEN, tuple(hidden.shape), DTYPE, lambda: hidden)]
            ):
                pass
            sync(unfinished)
            unfinished.rename(self._file(shard))
        finally:
            unfinished.unlink(missing_ok=True)

    def rows(self, samples: Sequence[Sample], device: torch.device) -> Tensor:
        """The kept rows of a micro-batch, float32 [n, hidden_size], in their order.

        Raises:
            CheckpointError: a damaged shard.
        """
        parts = []
        for sample in samples:
            shard, first, stop = self._place[sample]
            parts.append(self._shard(shard)[first:stop])
        return torch.from_numpy(np.concatenate(parts)).to(device).float()

    def _shard(self, shard: int) -> np.ndarray:
        if shard not in self._open:
            path = self._file(shard)
            start = read_index(path)[HIDDEN].start
            shape = (self._rows[shard], self.width)
            self._open[shard] = np.memmap(path, np.float16, "r", offset=start, shape=shape)
        return self._open[shard]


def cache_folder(
    setting: str,
    model: Path,
    samples: Sequence[Sample],
    distances: Sequence[int],
    *,
    int8: bool = False,
) -> Path:
    """Where the hidden states of these samples are kept.

    Args:
        setting: "true" for a folder in Jupiter's cache, else the folder to keep them in.
        int8: they are those of the base in int8.
    """
    root = cache_dir() / "hidden" if setting == "true" else Path(setting).expanduser()
    digest = hashlib.sha256(identity(find_weights(model).files).encode())
    digest.update(f"{DTYPE} {SHARD_TOKENS} {list(distances)} {data_digest(samples)}".encode())
    if int8:
        digest.update(b"int8")
    return root / f"{model.name}-{digest.hexdigest()[:16]}"


def data_digest(samples: Sequence[Sample] | RowStream) -> str:
    """A name for these samples: other tokens, targets or order, another name."""
    if isinstance(samples, StoredSamples | LazySamples | RowStream):
        return samples.digest[:16]
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(sample.tokens, dtype="<i8").data)
        digest.update(np.ascontiguousarray(sample.targets, dtype=np.bool_).data)
    return digest.hexdigest()[:16]


def _cut(lengths: Sequence[int], room: int) -> list[range]:
    """Consecutive ranges of at most `room` tokens; a longer sample is alone."""
    spans, start, used = [], 0, 0
    for index, length in enumerate(lengths):
        if index > start and used + length > room:
            spans.append(range(start, index))
            start, used = index, 0
        used += length
    if lengths:
        spans.append(range(start, len(lengths)))
    return spans
