"""Rows that are tokenized while the run goes on (lazy), or even read then (streaming).

What stands at a place of the data depends on the files and the seed alone, so all ranks agree and
a run can be gone on with. A row that has nothing to learn makes way for the next that has.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import overload

from engine.text import TextCodec
from engine.training.packing import pack
from engine.training.row_files import DataError
from engine.training.rows import Questions, Row, parse_spec, stream_rows
from engine.training.template import Form, Sample, tokenize_chunk
from engine.training.tokenizing import digest_of

BLOCK = 1000
"""Rows of a stream that are in memory, and shuffled, at a time."""


class LazySamples(Sequence[Sample]):
    """Samples that are made anew whenever they are asked for."""

    def __init__(self, rows: Sequence[Row], codec: TextCodec, form: Form) -> None:
        self._rows, self._codec, self._form = rows, codec, form
        self.digest = digest_of(rows, codec, form)
        """A name for these samples."""

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        for step in range(len(self._rows)):
            row = self._rows[(index + step) % len(self._rows)]
            found = tokenize_chunk([row], self._codec, self._form).samples
            if found:
                return found[0]
        raise DataError(f"{self._rows[index].where}: neither it nor another row has to be learnt")


class RowStream:
    """The rows of `path[#N]` specs, read as they are needed, over and over.

    Of `path#N` these are the first N rows; what is not read cannot be drawn from.

    Args:
        fill: what becomes of each row before it is tokenized.
        shuffled: whether the rows of a block come in an order drawn with the seed.
        room: tokens that are packed together; None for single samples.
    """

    def __init__(
        self,
        specs: Sequence[str],
        codec: TextCodec,
        form: Form,
        *,
        seed: int,
        shuffled: bool,
        room: int | None = None,
        questions: Questions | None = None,
        fill: Callable[[Row], Row] = lambda row: row,
    ) -> None:
        self._files = [parse_spec(spec) for spec in specs]
        self._codec, self._form, self._questions, self._fill = codec, form, questions, fill
        self._seed, self._shuffled, self._room = seed, shuffled, room
        self._units: Sequence[list[Sample]] = ()
        self._start = 0
        """Place of the first unit of the block in memory."""
        self._blocks = self._read_blocks()
        next(self._rows(), None)  # a file that is not there is told before the run begins
        sizes = [(str(path), path.stat().st_size, count) for path, count in self._files]
        told = f"{sizes} {seed} {shuffled} {room} {form}"
        self.digest = hashlib.sha256(told.encode()).hexdigest()[:24]
        """A name for the samples; of the files only name and size are in it."""

    def __getitem__(self, place: int) -> list[Sample]:
        """The samples of the place-th unit of the run; cheap where places come in rising order.

        Raises DataError for a bad row, when it is its turn.
        """
        if place < self._start:
            self._units, self._start, self._blocks = (), 0, self._read_blocks()
        while place >= self._start + len(self._units):
            self._start += len(self._units)
            self._units = self._units_of(next(self._blocks))
        return self._units[place - self._start]

    def _rows(self) -> Iterator[Row]:
        """One pass over the files."""
        for path, count in self._files:
            yield from islice(stream_rows(path, self._questions), count)

    def _read_blocks(self) -> Iterator[list[Row]]:
        number = 0
        block: list[Row] = []
        while True:
            before = number * BLOCK + len(block)
            for row in self._rows():
                block.append(self._fill(row))
                if len(block) == BLOCK:
                    if self._shuffled:
                        random.Random(f"{self._seed}/block {number}").shuffle(block)
                    yield block
                    number, block = number + 1, []
            if number * BLOCK + len(block) == before:
                names = " ".join(str(path) for path, _ in self._files)
                raise DataError(f"{names}: holds no rows")

    def _units_of(self, rows: list[Row]) -> Sequence[list[Sample]]:
        if self._room is None:
            return _Single(LazySamples(rows, self._codec, self._form))
        samples = tokenize_chunk(rows, self._codec, self._form).samples
        if not samples:
            raise DataError(
                f"{rows[0].where}: it and the {len(rows) - 1} rows after it have nothing to learn"
            )
        bins = pack([len(sample) for sample in samples], self._room, self._seed)
        return [[samples[at] for at in chosen] for chosen in bins]


class _Single(Sequence[list[Sample]]):
    def __init__(self, samples: LazySamples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> list[Sample]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Sample]]: ...
    def __getitem__(self, index: int | slice) -> list[Sample] | list[list[Sample]]:
        if isinstance(index, slice):
            return [[sample] for sample in self._samples[index]]
        return [self._samples[index]]
