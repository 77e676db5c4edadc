"""The tokenizer.json of a model folder, made where there is only an older kind. Torch-free."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoint.cache import Progress, Workshop, identity, make_once
from engine.checkpoint.child import CONVERT
from engine.checkpoint.weight_files import TOKENIZER_FILES, check_tokenizer
from engine.paths import cache_dir


def ensure_tokenizer(folder: Path, progress: Progress = lambda message: None) -> Path:
    """The path of a tokenizer.json that is the tokenizer of the model in `folder`.

    Where there is only a tokenizer.model (or vocab.json and merges.txt), transformers converts
    it in a process of its own, once; the result is kept in the cache.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be converted.
    """
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    check_tokenizer(folder)
    files = [folder / name for names in TOKENIZER_FILES for name in names]

    def build(workshop: Workshop) -> None:
        workshop.run(CONVERT, "tokenizer", str(folder), str(workshop.result))

    name = f"{folder.resolve().name}--{identity(file for file in files if file.is_file())}"
    return make_once(cache_dir() / "tokenizers" / name, build, progress) / "tokenizer.json"
