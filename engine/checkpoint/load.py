"""Filling the parameters of a stage from its checkpoint, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.checkpoint.heads import HeadReader
from engine.checkpoint.reader import open_checkpoint
from engine.errors import CheckpointError
from engine.model.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
HEADS = "medusa_head."
ROOT_EMBEDDING = "root_embedding.weight"
"""The last stage's own copy of the embedding, for heads that see the root token."""


def load_weights(
    model: nn.Module,
    folder: Path,
    heads: Path | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
    cut: Callable[[str, Tensor], Tensor] = lambda name, whole: whole,
) -> None:
    """Give `model`, built on the meta device, exactly its own parameters.

    The keys of its state dict are the global names of the checkpoint in `folder`. `medusa_head.*`
    come from the checkpoint of heads at `heads`, or from `folder` itself where it is a merged
    model. Tensors are read one by one, so the peak is about the stage's own size.

    Args:
        dtype: of all parameters; device: where they go.
        progress: called with the number of tensors loaded and their total.
        cut: what to keep of the tensor for a parameter, by its name.

    Raises:
        CheckpointError: a tensor is missing, damaged or of another shape; one line with the
            key, the file and both shapes.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    head_names = [name for name in shapes if name.startswith(HEADS)]
    loaded: dict[str, nn.Parameter] = {}

    def place(found: _Found) -> None:
        found.tensor = cut(found.name, found.tensor)
        if found.tensor.shape != shapes[found.name]:
            raise CheckpointError(
                f"{found.file}: tensor {found.source} is {list(found.tensor.shape)}, "
                f"but the model needs {list(shapes[found.name])}"
            )
        if found.source not in loaded:  # tied weights are one parameter under two names
            moved = found.tensor.to(device, dtype).contiguous()
            loaded[found.source] = nn.Parameter(moved, requires_grad=False)
        owner, _, attribute = found.name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, loaded[found.source])

    parts = [_base_tensors([name for name in shapes if name not in head_names], folder)]
    if head_names:
        parts.append(_head_tensors(head_names, heads or folder))
    for done, found in enumerate(chain(*parts), 1):
        place(found)
        progress(done, len(shapes))
    if head_names and LM_HEAD in shapes:
        _check_shared_head(heads or folder, model.get_parameter(LM_HEAD))


@dataclass
class _Found:
    """A tensor for the parameter `name`, stored as `source` in `file`."""

    name: str
    source: str
    file: Path
    tensor: Tensor


def _base_tensors(names: list[str], folder: Path) -> Iterator[_Found]:
    tied = ModelConfig.from_folder(folder).tie_word_embeddings
    copies = {ROOT_EMBEDDING, LM_HEAD} if tied else {ROOT_EMBEDDING}
    sources = {name: EMBEDDING if name in copies else name for name in names}
    with open_checkpoint(folder) as reader:
        # File by file, so that each is opened once.
        for name, source in sorted(sources.items(), key=lambda item: str(reader.file(item[1]))):
            yield _Found(name, source, reader.file(source), reader.tensor(source))


def _head_tensors(names: list[str], path: Path) -> Iterator[_Found]:
    reader = HeadReader(path)
    for name in names:
        yield _Found(name, name, reader.path, reader.tensor(name))


def _check_shared_head(path: Path, lm_head: Tensor) -> None:
    """Heads that came with a copy of their model's `lm_head` tell whether it is this model."""
    copy = HeadReader(path).lm_head()
    if copy is None or copy.shape != lm_head.shape:
        return  # none, or rows of a part of the vocabulary
    scale = copy.abs().max().float()
    difference = (copy.to(lm_head) - lm_head).abs().max().float().cpu()
    # A copy in another precision is as good.
    if difference > 0.02 * scale:
        raise CheckpointError(
            f"{path}: the lm_head kept with these heads is not this model's; "
            "they are of another model"
        )
