"""Tokenizing many rows, in this process or in several, and keeping what came of it on the disk."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from engine.checkpoint.cache import Workshop, make_once
from engine.errors import CheckpointError
from engine.owners import watch_owners
from engine.paths import cache_dir
from engine.text import TextCodec
from engine.training.rows import Row
from engine.training.template import Form, Sample, Tokenized, tokenize_chunk

CHUNK = 1000
"""Rows that are tokenized together; fewer start no processes."""
KEPT = 32
"""Data sets whose tokens are kept; those not used for longest make way."""
VERSION = 1
Tell = Callable[[str], None]


class StoredSamples(Sequence[Sample]):
    """Samples in three arrays, which may be mapped files; each is one object, made when needed."""

    def __init__(
        self,
        tokens: npt.NDArray[np.int64],
        targets: npt.NDArray[np.bool_],
        lengths: npt.NDArray[np.int64],
        digest: str,
    ) -> None:
        self._tokens, self._targets = tokens, targets
        self.lengths = lengths
        """int64 [n]: tokens of each sample."""
        self.digest = digest
        """A name for these samples."""
        self._ends = np.cumsum(lengths)
        self._made: list[Sample | None] = [None] * len(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        sample = self._made[index]
        if sample is None:
            end = int(self._ends[index])
            span = slice(end - int(self.lengths[index]), end)
            sample = Sample(np.asarray(self._tokens[span]), np.asarray(self._targets[span]))
            self._made[index] = sample
        return sample


def tokenize(
    rows: Sequence[Row],
    codec: TextCodec,
    form: Form = Form(),  # noqa: B008 (frozen)
    *,
    processes: int | None = None,
    note: Tell = lambda text: None,
) -> list[Sample]:
    """The samples of `rows`, in their order.

    Args:
        processes: how many tokenize; None for this one with a thread a core.
        note: told how many rows were cut or dropped.

    Raises:
        DataError: a row that the chat template refuses, or that has no answer.
    """
    done = _tokenize(rows, codec, form, processes)
    _tell(done.cut, done.dropped, len(rows), form, note)
    return done.samples


def stored(
    rows: Sequence[Row],
    codec: TextCodec,
    form: Form,
    *,
    processes: int | None = None,
    note: Tell = lambda text: None,
) -> StoredSamples:
    """As `tokenize`, with the tokens kept on the disk: the same rows are tokenized once.

    Other rows, another tokenizer, template or form make another store. Processes that want the
    same at the same time wait for the first. Where the cache cannot be written, all stays in
    memory.
    """
    key = digest_of(rows, codec, form)

    def build(workshop: Workshop) -> None:
        done = _tokenize(rows, codec, form, processes)
        for name, array in _arrays(done.samples).items():
            np.save(workshop.result / f"{name}.npy", array)
        facts = {"cut": done.cut, "dropped": done.dropped}
        (workshop.result / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

    folder = cache_dir() / "tokens" / key
    try:
        if "strftime_now" in codec.template_source:
            raise CheckpointError("the template writes today's date")
        make_once(folder, build, lambda line: None)
        found = _open(folder, key)
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        cut, dropped = facts["cut"], facts["dropped"]
        os.utime(folder)
        _forget_old(folder.parent)
    except (CheckpointError, OSError, ValueError):  # no place for it, or half of it was deleted
        done = _tokenize(rows, codec, form, processes)
        cut, dropped = done.cut, done.dropped
        found = StoredSamples(**_arrays(done.samples), digest=key)
    _tell(cut, dropped, len(rows), form, note)
    return found


def digest_of(rows: Sequence[Row], codec: TextCodec, form: Form) -> str:
    """A name for what these rows become: of their content, the tokenizer, template and form."""
    digest = hashlib.sha256(f"{VERSION} {form} {sorted(codec.stop_ids)} {codec.special}".encode())
    digest.update(codec.tokenizer.to_str().encode())
    digest.update(codec.template_source.encode())
    for row in rows:
        messages = [(message.role, message.content) for message in row.messages]
        digest.update(repr((messages, row.text, row.cut)).encode())
    return digest.hexdigest()[:24]


def _arrays(samples: Sequence[Sample]) -> dict[str, npt.NDArray]:
    none = Sample(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_))
    return {
        "tokens": np.concatenate([s.tokens for s in (*samples, none)]),
        "targets": np.concatenate([s.targets for s in (*samples, none)]),
        "lengths": np.array([len(s) for s in samples], dtype=np.int64),
    }


def _open(folder: Path, key: str) -> StoredSamples:
    tokens, targets, lengths = (
        np.load(folder / f"{name}.npy", mmap_mode="r" if name != "lengths" else None)
        if (folder / f"{name}.npy").stat().st_size > 128  # an empty array cannot be mapped
        else np.load(folder / f"{name}.npy")
        for name in ("tokens", "targets", "lengths")
    )
    if lengths.sum() != len(tokens) or len(tokens) != len(targets):
        raise ValueError("the arrays are not of the same samples")
    return StoredSamples(tokens, targets, lengths, key)


def _forget_old(root: Path) -> None:
    folders = sorted(root.glob("[0-9a-f]*"), key=lambda folder: folder.stat().st_mtime)
    for folder in folders[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)


def _tell(cut: int, dropped: int, count: int, form: Form, note: Tell) -> None:
    if cut:
        note(f"{cut} of {count} rows are longer than max_length {form.max_length} and were cut")
    if dropped:
        note(f"{dropped} of {count} rows have nothing left to learn and were dropped")


def _tokenize(
    rows: Sequence[Row], codec: TextCodec, form: Form, processes: int | None
) -> Tokenized:
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    if processes is None or processes == 1 or len(chunks) == 1:
        with _threads(processes):
            parts = [tokenize_chunk(chunk, codec, form) for chunk in chunks]
    else:
        with _pool(min(processes, len(chunks)), codec) as pool, _threads(1):
            parts = list(pool.map(partial(_in_worker, form=form), chunks))
    return Tokenized(
        list(chain.from_iterable(part.samples for part in parts)),
        sum(part.cut for part in parts),
        sum(part.dropped for part in parts),
    )


_worker_codec: TextCodec | None = None


def _pool(processes: int, codec: TextCodec) -> ProcessPoolExecutor:
    # Not forked: this process has threads of torch and of the tokenizer.
    return ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_worker,
        initargs=(codec.made_of, os.getpid()),
    )


def _begin_worker(made_of: tuple[Path, Path, tuple[int, ...]], owner: int) -> None:
    global _worker_codec
    watch_owners(owner)
    _worker_codec = TextCodec(*made_of)


def _in_worker(rows: Sequence[Row], form: Form) -> Tokenized:
    assert _worker_codec is not None
    return tokenize_chunk(rows, _worker_codec, form)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Have the tokenizer use so many threads; it reads their number when it first needs them."""
    if count is None:
        yield
        return
    names = {"RAYON_NUM_THREADS": str(count), "TOKENIZERS_PARALLELISM": str(count > 1).lower()}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
