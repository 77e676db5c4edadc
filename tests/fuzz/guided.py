"""`python -m tests.fuzz.guided TARGET RUNS SEED`: one target under atheris (libFuzzer)."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["engine", "tui", "gguf"]):
    from tests.fuzz.run import limit
    from tests.fuzz.targets import TARGETS, check


def main() -> None:
    """Ends the process: 0 when nothing was found."""
    name, runs, seed = sys.argv[1:]
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as folder:
        place, corpus = Path(folder, "work"), Path(folder, "corpus")
        place.mkdir()
        corpus.mkdir()
        for number, data in enumerate(target.seeds(place)):
            (corpus / str(number)).write_bytes(data)

        def one(data: bytes) -> None:
            with limit():
                check(target, data, place)

        atheris.Setup([sys.argv[0], f"-runs={runs}", f"-seed={seed}", str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
