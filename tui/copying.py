"""Copies text: to the terminal's clipboard, and to a file for terminals that have none."""

from __future__ import annotations

from typing import Any

from textual.app import App

from engine.paths import make_private, state_dir
from tui.store import write_private


def copy(app: App[Any], text: str, what: str) -> None:
    """Copy `text` and say so.

    A terminal does not tell whether it took what OSC 52 offers; so the text is also written to
    a private file, which the notice names.
    """
    app.copy_to_clipboard(text)
    path = state_dir() / "copied.txt"
    try:
        make_private(path.parent)
        write_private(path, text.encode())
    except OSError:
        app.notify("for a terminal that takes it", title=f"{what} copied")
        return
    app.notify(f"also in {path}", title=f"{what} copied", markup=False)
