"""The command palette: every action that the keys reach right now, in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from textual.app import App, SystemCommand
from textual.screen import Screen


def offers(app: App[Any], screen: Screen[Any]) -> Iterator[SystemCommand]:
    """The commands of `screen`: what its state allows at this moment, and no more.

    Whatever has a binding with an id, a description and a green light from `check_action` is
    offered; so a screen adds a command by adding a binding.
    """
    offered: set[str] = set()
    for key, (node, binding, enabled, tooltip) in screen.active_bindings.items():
        ours = binding.id is not None and binding.description and not binding.system
        if not ours or not enabled or binding.description in offered:
            continue
        offered.add(binding.description)
        shown = app.get_key_display(binding.with_key(key))
        about = f"{tooltip} · {shown}" if tooltip else shown
        yield SystemCommand(
            binding.description, about, partial(app.run_action, binding.action, node)
        )
