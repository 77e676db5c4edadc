"""A training checkpoint as a model folder that the engine takes. Torch-free."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.checkpoint.hub import TEXT_FILES
from engine.checkpoint.mcore_files import (
    ARGUMENTS,
    ITERATION,
    iteration_folder,
    model_folder,
    write_tracker,
)


@contextmanager
def as_model(checkpoint: Path, model: Path | None = None) -> Iterator[Path]:
    """A folder with config, tokenizer and the weights of `checkpoint`, for as long as it is needed.

    It is `checkpoint` itself where that is a run folder with its model's config.json; an iteration
    folder, or a checkpoint without a config, is seen through links in a temporary folder.

    Args:
        checkpoint: a run folder, whose latest iteration is taken, or an iteration folder.
        model: where config and tokenizer are, if not beside the checkpoint.

    Raises:
        CheckpointError: no whole checkpoint there, or no config.
    """
    iteration = iteration_folder(checkpoint).absolute()
    texts = (model or model_folder(checkpoint)).absolute()
    if texts == checkpoint.absolute():
        yield texts
        return
    with tempfile.TemporaryDirectory(prefix="jupiter-checkpoint-") as name:
        view = Path(name)
        for file in (*TEXT_FILES, ARGUMENTS):
            if (texts / file).is_file():
                (view / file).symlink_to(texts / file)
        number = ITERATION.fullmatch(iteration.name)
        count = int(number[1]) if number else 0  # "release", or a name of one's own
        (view / f"iter_{count:07}").symlink_to(iteration)
        write_tracker(view, count)
        yield view
