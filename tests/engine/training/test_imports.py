"""Arguments, data and generation are free of torch: only ranks and stages need it."""

from __future__ import annotations

import subprocess
import sys


def test_the_command_and_its_data_never_import_torch() -> None:
    code = (
        "import engine.cli.medusa, engine.training.data, engine.training.generate, sys\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"torch", "transformers", "textual"} & set(done.stdout.split())
