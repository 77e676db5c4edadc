"""The `keymap` of config.json: other keys for the workbench, checked before it opens."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import ModuleType

from textual.binding import Binding
from textual.dom import DOMNode
from textual.keys import Keys, key_to_character
from textual.widgets import TextArea

from engine.errors import ConfigError

PACKAGES = ("tui.screens", "tui.widgets")
MODIFIERS = frozenset(("ctrl", "alt", "shift", "super", "meta", "hyper"))
NAMED_KEYS = frozenset(key.value for key in Keys if not key.value.startswith("<"))
EVERYWHERE = "app"
"""Bindings of this scope hold on every screen; the others where the part of that name is."""
WITH_PROMPT = (EVERYWHERE, "chat", "prompt")
"""Where the prompt has the focus most of the time."""


def checked_keymap(keymap: Mapping[str, str]) -> Mapping[str, str]:
    """`keymap` (binding id: keys, such as "ctrl+g,f6") if every screen can take it.

    Raises ConfigError for an id that no binding has, for what is no key, and for a key that
    two actions of one screen would share.
    """
    if keymap:  # every screen is imported to know its keys, which takes a moment
        check(keymap, [*every_binding()], editing_keys())
    return keymap


def check(
    keymap: Mapping[str, str],
    bindings: Sequence[Binding],
    editing: Collection[str] = frozenset(),
) -> None:
    """Check `keymap` against `bindings` and the keys that edit the prompt; see checked_keymap."""
    keys = default_keys(bindings)
    first = {binding.id for binding in bindings if binding.priority}  # before the prompt
    for name, text in keymap.items():
        if name not in keys:
            raise ConfigError(f"config key 'keymap': unknown id '{name}'{_suggest(name, keys)}")
        for key in split_keys(text):
            if not is_key(key):
                raise ConfigError(
                    f"config key 'keymap': '{name}': '{key}' is no key; write such as ctrl+g or f9"
                )
            if key in editing and name not in first and _scope(name) in WITH_PROMPT:
                raise ConfigError(
                    f"config key 'keymap': '{name}': '{key}' edits the prompt; take another key"
                )
    keys |= {name: set(split_keys(text)) for name, text in keymap.items()}
    for name in keymap:
        for other in keys:
            shared = keys[name] & keys[other]
            if other != name and shared and _meet(name, other):
                raise ConfigError(
                    f"config key 'keymap': '{name}' and '{other}' cannot both be on "
                    f"'{min(shared)}'; give one of them another key"
                )


def default_keys(bindings: Iterable[Binding]) -> dict[str, set[str]]:
    """The keys of each binding id."""
    keys: dict[str, set[str]] = {}
    for binding in bindings:
        if binding.id is not None:
            keys.setdefault(binding.id, set()).update(split_keys(binding.key))
    return keys


def split_keys(text: str) -> list[str]:
    """The keys of a binding's text, which separates them by commas."""
    return [key.strip() for key in text.split(",")]


def is_key(text: str) -> bool:
    """Whether `text` names a key, with or without modifiers: `f6`, `ctrl+g`, `?`."""
    *modifiers, key = text.split("+")
    known = text in NAMED_KEYS or key in NAMED_KEYS or key_to_character(key) is not None
    return known and MODIFIERS.issuperset(modifiers)


def every_binding() -> Iterator[Binding]:
    """Every binding of the app, its screens and its widgets."""
    for module in _modules():
        for value in vars(module).values():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and issubclass(value, DOMNode):
                yield from Binding.make_bindings(value.BINDINGS)


def _modules() -> Iterator[ModuleType]:
    yield importlib.import_module("tui.app")
    for package in PACKAGES:
        found = pkgutil.iter_modules(importlib.import_module(package).__path__)
        for name in sorted(module.name for module in found):
            yield importlib.import_module(f"{package}.{name}")


def editing_keys() -> set[str]:
    """The keys that the prompt needs itself."""
    bindings = Binding.make_bindings(TextArea.BINDINGS)
    return {key for binding in bindings for key in split_keys(binding.key)}


def _scope(name: str) -> str:
    return name.partition(".")[0]


def _meet(one: str, other: str) -> bool:
    scopes = {_scope(one), _scope(other)}
    return len(scopes) == 1 or EVERYWHERE in scopes


def _suggest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else "; the help (F1) tells the ids"
