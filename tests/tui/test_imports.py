"""What the workbench imports: nothing heavy, so that it paints at once."""

from __future__ import annotations

import subprocess
import sys

import pytest


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after `code`."""
    script = f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import tui.cli, tui.terminal, tui.app, tui.screens.help, tui.widgets.turn",
        "import tui.session; tui.session._real_client()",
    ],
)
def test_the_workbench_never_imports_torch(code: str) -> None:
    assert not {"torch", "transformers", "numpy"} & modules_after(code)


def test_the_first_paint_waits_for_neither_sockets_nor_markdown() -> None:
    assert not {"zmq", "markdown_it"} & modules_after("import tui.cli, tui.terminal, tui.app")


def test_the_command_line_is_read_without_textual() -> None:
    assert "textual" not in modules_after("import tui.cli")
