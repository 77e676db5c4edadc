"""What the user chose for the screen, kept in the state folder from one run to the next."""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.paths import make_private, state_dir
from tui.store import write_private


class Preferences(msgspec.Struct, frozen=True):
    """The choices; unknown keys of a newer version are passed over."""

    theme: str | None = None


def preferences_file() -> Path:
    """Where the choices are kept."""
    return state_dir() / "ui.json"


def load() -> Preferences:
    """The choices of the last run; the defaults where there are none.

    Raises OSError or ValueError with one line when the file is there but cannot be used.
    """
    try:
        text = preferences_file().read_bytes()
    except FileNotFoundError:
        return Preferences()
    try:
        return msgspec.json.decode(text, type=Preferences)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from None


def save(preferences: Preferences) -> None:
    """Keep the choices, as a whole or not at all. Raises OSError."""
    path = preferences_file()
    make_private(path.parent)
    write_private(path, msgspec.json.encode(preferences))
