"""The data of a training run: samples, and the micro-batches that each rank gets. Torch-free.

The order in which samples come depends on the seed and their number alone. A step takes the next
`global_batch_size` sequences of it, however many ranks share them, so a run can be resumed with
other ranks where it stopped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from engine.text import TextCodec
from engine.training.args import TrainArguments
from engine.training.packing import pack
from engine.training.row_files import DataError
from engine.training.rows import Split, read_questions, read_split
from engine.training.template import Sample, tokenize

__all__ = ["DataError", "Sample", "load_samples", "micro_batches", "sequences"]


def load_samples(
    args: TrainArguments,
    codec: TextCodec,
    split: Split,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> list[Sample]:
    """The tokenized rows for training or for evaluation; the latter may be none.

    Args:
        args: `dataset`, `val_dataset`, `split_dataset_ratio`, `batch_input`, `seed`, `system`,
            `max_length`, `dataset_num_proc`.
        note: told, for people, how many rows were cut or dropped.

    Raises:
        DataError: a file or row that cannot be used, by file and line, or nothing to learn.
    """
    questions = read_questions(args.batch_input) if args.batch_input else None
    has_own = bool(args.val_dataset)
    rows = read_split(
        args.val_dataset if split == "eval" and has_own else args.dataset,
        seed=args.seed,
        split="train" if has_own else split,
        held_out=0.0 if has_own else args.split_dataset_ratio,
        questions=questions,
    )
    samples = tokenize(
        rows,
        codec,
        system=args.system,
        max_length=args.max_length,
        threads=args.dataset_num_proc,
        note=note,
    )
    if split == "train" and not samples:
        raise DataError(f"{' '.join(args.dataset)}: holds nothing to learn")
    return samples


def sequences(samples: Sequence[Sample], args: TrainArguments) -> list[list[Sample]]:
    """What a batch size counts: single samples, or with `packing` as many as fit `max_length`."""
    if not args.packing:
        return [[sample] for sample in samples]
    longest = max(map(len, samples), default=1)
    room = args.max_length or args.seq_length or longest
    bins = pack([len(sample) for sample in samples], room, args.seed)
    return [[samples[index] for index in chosen] for chosen in bins]


def micro_batches(
    samples: Sequence[Sample],
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
    units = sequences(samples, args)
    shuffled = args.dataloader_type == "cyclic" and not in_order
    order = _Order(len(units), args.seed, shuffled=shuffled)
    size, together = args.micro_batch_size, args.micro_batch_size * dp_size
    start = consumed_samples
    while True:
        for first in range(start, start + args.global_batch_size, together):
            mine = first + dp_rank * size
            yield [sample for at in range(mine, mine + size) for sample in units[order[at]]]
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
