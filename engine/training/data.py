"""The data of a training run: samples, and the micro-batches that each rank gets. Torch-free.

The order in which samples come depends on the seed and their number alone. A step takes the next
`global_batch_size` sequences of it, however many ranks share them, so a run can be resumed with
other ranks where it stopped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, overload

from engine.text import TextCodec
from engine.training.args import TrainArguments
from engine.training.packing import pack
from engine.training.reading import LazySamples, RowStream
from engine.training.row_files import DataError
from engine.training.rows import Row, Split, read_questions, read_split
from engine.training.self_cognition import fill_all, make_names
from engine.training.template import Form, Sample
from engine.training.tokenizing import StoredSamples, stored

__all__ = ["DataError", "Sample", "count_sequences", "load_samples", "micro_batches", "sequences"]

Tell = Callable[[str], None]
Samples = Sequence[Sample] | RowStream


@overload
def load_samples(
    args: TrainArguments, codec: TextCodec, split: Literal["eval"], *, note: Tell = ...
) -> Sequence[Sample]: ...
@overload
def load_samples(
    args: TrainArguments, codec: TextCodec, split: Split, *, note: Tell = ...
) -> Samples: ...
def load_samples(
    args: TrainArguments,
    codec: TextCodec,
    split: Split,
    *,
    note: Tell = lambda text: None,
) -> Samples:
    """The tokenized rows for training or for evaluation; the latter may be none.

    With `streaming` the rows for training are a RowStream, with `lazy_tokenize` LazySamples.

    Args:
        args: `dataset`, `val_dataset`, `split_dataset_ratio`, `batch_input`, `seed`, `system`,
            `max_length`, `dataset_num_proc`, `model_name`, `model_author`, `lazy_tokenize`,
            `streaming`, `packing`, `dataloader_type`.
        note: told, for people, how many rows were cut or dropped.

    Raises:
        DataError: a file or row that cannot be used, by file and line, or nothing to learn.
    """
    if args.streaming and split == "train":
        return _stream(args, codec)
    rows = _read(args, split, note)
    if args.lazy_tokenize and split == "train":
        return LazySamples(rows, codec, form_of(args))
    samples = stored(rows, codec, form_of(args), processes=args.dataset_num_proc, note=note)
    if split == "train" and not samples:
        raise DataError(f"{' '.join(args.dataset)}: holds nothing to learn")
    return samples


def form_of(args: TrainArguments) -> Form:
    """How the rows of a run become samples."""
    return Form(args.system, args.max_length, whole=args.command == "pt")


def _stream(args: TrainArguments, codec: TextCodec) -> RowStream:
    return RowStream(
        args.dataset,
        codec,
        form_of(args),
        seed=args.seed,
        shuffled=args.dataloader_type == "cyclic",
        room=(args.max_length or args.seq_length) if args.packing else None,
        questions=read_questions(args.batch_input) if args.batch_input else None,
        fill=make_names(args.model_name, args.model_author).fill,
    )


def _read(args: TrainArguments, split: Split, note: Tell) -> list[Row]:
    questions = read_questions(args.batch_input) if args.batch_input else None
    has_own = bool(args.val_dataset)
    if args.streaming and not has_own:
        return []
    rows = read_split(
        args.val_dataset if split == "eval" and has_own else args.dataset,
        seed=args.seed,
        split="train" if has_own else split,
        held_out=0.0 if has_own else args.split_dataset_ratio,
        questions=questions,
    )
    names = make_names(args.model_name, args.model_author)
    return fill_all(rows, names, note if split == "train" else lambda text: None)


class Units(Sequence[list[Sample]]):
    """What a batch size counts: single samples, or several that are packed together."""

    def __init__(self, samples: Sequence[Sample], bins: Sequence[Sequence[int]] | None) -> None:
        self._samples, self._bins = samples, bins

    def __len__(self) -> int:
        return len(self._samples if self._bins is None else self._bins)

    @overload
    def __getitem__(self, index: int) -> list[Sample]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Sample]]: ...
    def __getitem__(self, index: int | slice) -> list[Sample] | list[list[Sample]]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        chosen = [index] if self._bins is None else self._bins[index]
        return [self._samples[at] for at in chosen]


def sequences(samples: Sequence[Sample], args: TrainArguments) -> Units:
    """What a batch size counts: single samples, or with `packing` as many as fit `max_length`."""
    if not args.packing:
        return Units(samples, None)
    if isinstance(samples, StoredSamples):
        lengths = samples.lengths.tolist()
    else:
        lengths = [len(sample) for sample in samples]
    room = args.max_length or args.seq_length or max(lengths, default=1)
    return Units(samples, pack(lengths, room, args.seed))


def count_sequences(samples: Samples, args: TrainArguments) -> int | None:
    """How many sequences an epoch has; None for a stream, which does not know."""
    return None if isinstance(samples, RowStream) else len(sequences(samples, args))


def micro_batches(
    samples: Samples,
    *,
    args: TrainArguments,
    dp_rank: int,
    dp_size: int,
    consumed_samples: int,
    in_order: bool = False,
) -> Iterator[list[Sample]]:
    """The micro-batches of one data-parallel rank, for ever.

    With `packing` a micro-batch of `micro_batch_size` sequences holds more samples than that;
    each still attends to itself alone.

    Args:
        consumed_samples: sequences that all ranks together have taken before.
        in_order: without shuffling, whatever `dataloader_type` says (for evaluation).
    """
    if isinstance(samples, RowStream):
        unit = samples.__getitem__
    else:
        units = sequences(samples, args)
        shuffled = args.dataloader_type == "cyclic" and not in_order
        order = _Order(len(units), args.seed, shuffled=shuffled)

        def unit(place: int) -> list[Sample]:
            return units[order[place]]

    size, together = args.micro_batch_size, args.micro_batch_size * dp_size
    start = consumed_samples
    while True:
        for first in range(start, start + args.global_batch_size, together):
            mine = first + dp_rank * size
            yield [sample for at in range(mine, mine + size) for sample in unit(at)]
        start += args.global_batch_size


class _Order:
    """Which sequence is the n-th of the run: every epoch holds each one once."""

    def __init__(self, count: int, seed: int, *, shuffled: bool) -> None:
        self._count, self._seed, self._shuffled = count, seed, shuffled
        self._epochs: dict[int, list[int]] = {}

    def __getitem__(self, position: int) -> int:
        epoch, at = divmod(position, self._count)
        if not self._shuffled:
            return at
        if epoch not in self._epochs:
            order = list(range(self._count))
            random.Random(f"{self._seed}/epoch {epoch}").shuffle(order)
            # A batch may lie across two epochs.
            self._epochs = {key: value for key, value in self._epochs.items() if key == epoch - 1}
            self._epochs[epoch] = order
        return self._epochs[epoch][at]
