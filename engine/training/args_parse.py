"""Words of a command line, and files of arguments, to one of the argument dataclasses."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import ConfigError
from engine.training.args_fields import Argument, arguments, convert, is_list

FILE_KINDS = (".json", ".yaml", ".yml")
T = TypeVar("T")


def parse(
    words: Sequence[str], cls: type[T], noted: Sequence[str] = ()
) -> tuple[T, frozenset[str]]:
    """The arguments that `words` say, and the names of those that were given.

    The first word may be a JSON or YAML file of arguments; the command line goes before it. An
    argument that the file holds with its default value does not count as given, so the args.json
    of a run can be read again.

    noted: keys of such a file that are no arguments.

    Raises:
        ConfigError: an unknown argument, one given twice, or a value that is wrong.
    """
    known = _spellings(cls)
    values: dict[str, Any] = {}
    given = set()
    rest = list(words)
    if rest and not rest[0].startswith("--"):
        name = rest.pop(0)
        for key, value in read_file(Path(name).expanduser()).items():
            if key in noted:
                continue
            argument = _look_up(key, known, f"{name}: unknown key '{key}'")
            values[argument.name] = _from_file(argument, value, f"{name}: key '{key}'")
            if values[argument.name] != argument.default:
                given.add(argument.name)
    for name, (flag, texts) in split_words(rest, known).items():
        values[name] = from_words(known[name], flag, texts)
        given.add(name)
    return cls(**values), frozenset(given)


def split_words(
    words: Sequence[str], known: Mapping[str, Argument]
) -> dict[str, tuple[str, list[str]]]:
    """The flag as it was written, and its words, by the argument's name."""
    found: dict[str, tuple[str, list[str]]] = {}
    current: list[str] | None = None
    for word in words:
        if not word.startswith("--"):
            if current is None:
                raise ConfigError(f"{word}: unexpected; arguments are written --name value")
            current.append(word)
            continue
        flag, equals, value = word.partition("=")
        argument = _look_up(flag[2:].replace("-", "_"), known, f"unknown argument {flag}")
        if argument.name in found:
            raise ConfigError(f"{flag}: given twice")
        current = [value] if equals else []
        found[argument.name] = flag, current
    return found


def without(words: Sequence[str], cls: type, names: Sequence[str]) -> list[str]:
    """`words` without the arguments of these names, for a command that hands the rest on."""
    known = _spellings(cls)
    kept: list[str] = []
    dropping = False
    for word in words:
        if word.startswith("--"):
            flag = word.partition("=")[0][2:].replace("-", "_")
            dropping = flag in known and known[flag].name in names
        if not dropping:
            kept.append(word)
    return kept


def read_file(path: Path) -> dict[str, Any]:
    """The arguments in a JSON or YAML file.

    Raises:
        ConfigError: it is missing, of another kind, or does not hold one mapping.
    """
    if path.suffix not in FILE_KINDS:
        raise ConfigError(
            f"{path}: unexpected; arguments are written --name value, "
            f"or the first word is a file of them ({', '.join(FILE_KINDS)})"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    values = _read_json(path, text) if path.suffix == ".json" else _read_yaml(path, text)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold one mapping of names to values")
    return {str(key): value for key, value in values.items()}


def _read_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON that can be read: {error}") from None


def _read_yaml(path: Path, text: str) -> Any:
    import yaml  # rarely needed

    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{path}: {line}not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML that can be read: {error}") from None


def _spellings(cls: type) -> dict[str, Argument]:
    known = dict(arguments(cls))
    for argument in arguments(cls).values():
        known.update(dict.fromkeys(argument.also, argument))
    return known


def _look_up(name: str, known: Mapping[str, Argument], problem: str) -> Argument:
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    dashes = "--" if problem.startswith("unknown") else ""
    hint = f"; did you mean {dashes}{close[0]}?" if close else ""
    raise ConfigError(f"{problem}{hint}")


def from_words(argument: Argument, flag: str, texts: list[str]) -> Any:
    """The value of an argument that is given as the words `texts` behind `flag`.

    Raises:
        ConfigError: there are none, or they are wrong; the message begins with `flag`.
    """
    if not texts:
        raise ConfigError(f"{flag}: needs a value")
    if is_list(argument):
        none = len(texts) == 1 and texts[0].lower() in argument.none_words
        return convert(argument, None if none else texts, flag)
    if len(texts) > 1:
        raise ConfigError(f"{flag} {' '.join(texts)}: takes one value; quote one with spaces")
    return convert(argument, texts[0], flag)


def _from_file(argument: Argument, value: Any, where: str) -> Any:
    if is_list(argument):
        scalar = value is not None and not isinstance(value, list)
        return convert(argument, [value] if scalar else value, where)
    if isinstance(value, dict):  # rope_scaling is a JSON text, and natural as a mapping
        value = json.dumps(value)
    return convert(argument, value, where)
