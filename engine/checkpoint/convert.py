"""Conversions that need transformers, run as a process of their own.

`python -m engine.checkpoint.convert gguf FILE FOLDER`, `... tokenizer FOLDER OUTPUT`,
`... shapes PATH` or `... integers PATH TENSOR`. A process of its own keeps transformers and torch
out of the client, which only wants the result. Progress and the result go to stdout, a line each;
an error is the last line of stderr, with exit code 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, JupiterError


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model in the GGUF `file` to `folder` as a Hugging Face checkpoint."""
    from engine.checkpoint.gguf_file import GGUFCheckpoint

    def progress(done: int, total: int) -> None:
        if done * 20 // total != (done - 1) * 20 // total:
            _say(f"converting {file.name}: {done} of {total} tensors")

    GGUFCheckpoint(file).write(folder, progress)
    _say(f"converting {file.name}: tokenizer")
    _save_tokenizer(folder, _load_tokenizer(file.parent, gguf_file=file.name))


def convert_tokenizer(folder: Path, output: Path) -> None:
    """Write the tokenizer of a checkpoint without tokenizer.json to the folder `output`."""
    _say(f"converting the tokenizer of {folder.name}")
    _save_tokenizer(output, _load_tokenizer(folder))


def print_shapes(path: Path) -> None:
    """Print the shapes of a checkpoint's tensors by name, as one line of JSON."""
    from engine.checkpoint.reader import open_checkpoint

    _say(json.dumps(open_checkpoint(path).shapes()))


def print_integers(path: Path, name: str) -> None:
    """Print the values of an integer tensor, as one line of JSON."""
    from engine.checkpoint.reader import open_checkpoint

    _say(json.dumps(open_checkpoint(path).tensor(name).tolist()))


def _load_tokenizer(folder: Path, **options: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # whatever a damaged or unknown tokenizer makes of the library
        lines = str(error).strip().splitlines() or [type(error).__name__]
        where = folder / options.get("gguf_file", "")
        raise CheckpointError(f"{where}: its tokenizer cannot be read: {lines[0]}") from None


def _save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write tokenizer.json, and tokenizer_config.json with the chat template inside."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for machine_state in ("is_local", "local_files_only"):
        values.pop(machine_state, None)
    if tokenizer.chat_template is not None:
        values["chat_template"] = tokenizer.chat_template
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _say(message: str) -> None:
    print(message, flush=True)


def main(words: list[str]) -> int:
    """Run one conversion; returns the exit code."""
    command, *paths = words
    commands: dict[str, Callable[[], None]] = {
        "gguf": lambda: convert_gguf(*map(Path, paths)),
        "tokenizer": lambda: convert_tokenizer(*map(Path, paths)),
        "shapes": lambda: print_shapes(*map(Path, paths)),
        "integers": lambda: print_integers(Path(paths[0]), paths[1]),
    }
    try:
        commands[command]()
    except JupiterError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{error.filename or paths[-1]}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
