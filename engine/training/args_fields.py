"""What an argument is: a typed dataclass field that carries its own line of documentation.

Commands parse words against such dataclasses, docs/training.md lists them, forms can be made of
them. Free of torch.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from engine.errors import ConfigError

PositiveInt = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0.0)]
NotNegative = Annotated[float, Meta(ge=0.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
PartOfOne = Annotated[float, Meta(gt=0.0, le=1.0)]

NONE_WORDS = ("none", "null")
_METADATA = "argument"


@dataclass(frozen=True)
class Argument:
    """One argument, as `arg` describes it."""

    name: str
    hint: Any
    default: Any
    help: str
    shown: str | None
    """The default in words, where the value itself says too little."""
    instead: str | None
    """For an argument without meaning here: what happens whatever it says."""
    only: tuple[Any, ...] | None
    """The values that can be honoured; None for all of the type."""
    because: str
    """Why the others cannot."""
    also: tuple[str, ...]
    """Other spellings."""
    none_words: tuple[str, ...]
    """Words that mean None."""


def arg(
    default: Any,
    help: str,
    *,
    shown: str | None = None,
    instead: str | None = None,
    only: Sequence[Any] | None = None,
    because: str = "",
    also: Sequence[str] = (),
    none_words: Sequence[str] | None = None,
) -> Any:
    """A dataclass field that is an argument; see Argument for the parameters."""
    described = {
        "help": help,
        "shown": shown,
        "instead": instead,
        "only": None if only is None else tuple(only),
        "because": because,
        "also": tuple(also),
        "none_words": none_words,
    }
    if isinstance(default, list):
        kept = tuple(default)
        return dataclasses.field(
            default_factory=lambda: list(kept), metadata={_METADATA: described}
        )
    return dataclasses.field(default=default, metadata={_METADATA: described})


@cache
def arguments(cls: type) -> dict[str, Argument]:
    """The arguments of a dataclass by name, in their order; fields of other kinds are left out."""
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        if _METADATA not in field.metadata:
            continue
        described = dict(field.metadata[_METADATA])
        base, optional = _without_none(hints[field.name])
        if described["none_words"] is None:
            described["none_words"] = NONE_WORDS if optional and base is not str else ()
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        found[field.name] = Argument(
            name=field.name, hint=hints[field.name], default=default, **described
        )
    return found


def convert(argument: Argument, value: Any, where: str) -> Any:
    """`value`, which may be the word of a command line, as the argument's type.

    Args:
        where: names the argument in errors, such as "--lr" or "run.yaml: key 'lr'".

    Raises:
        ConfigError: another type, out of range, or a value that cannot be honoured.
    """
    if value is None or (isinstance(value, str) and value.lower() in argument.none_words):
        value = None
    elif isinstance(value, bool) and _without_none(argument.hint)[0] is str:
        value = str(value).lower()
        value = None if value in argument.none_words else value
    try:
        converted = msgspec.convert(value, argument.hint, strict=False)
    except msgspec.ValidationError:
        raise ConfigError(f"{where} {show(value)}: must be {expected(argument.hint)}") from None
    numbers = converted if isinstance(converted, list) else [converted]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise ConfigError(f"{where} {show(value)}: must be {expected(argument.hint)}")
    if argument.only is not None and converted not in argument.only:
        allowed = " or ".join(show(value) for value in argument.only if value is not None)
        instead = f"; here {allowed}" if allowed else "; leave it out"
        raise ConfigError(f"{where} {show(value)}: {argument.because}{instead}")
    return converted


def show(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(map(show, value))
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return str(value)


def is_list(argument: Argument) -> bool:
    """Whether it takes several values."""
    return get_origin(_without_none(argument.hint)[0]) is list


def expected(hint: Any) -> str:
    """What a value must be, in words."""
    base, _ = _without_none(hint)
    origin = get_origin(base)
    if origin is list:
        return f"a list, each {expected(get_args(base)[0])}"
    if origin is Literal:
        return _either(map(show, get_args(base)))
    if origin is Annotated:
        kind, *limits = get_args(base)
        return expected(kind) + "".join(map(_limit, limits))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names[base]


def _limit(meta: Meta) -> str:
    bounds = [
        f"{word} {show(bound)}"
        for word, bound in (("above", meta.gt), ("from", meta.ge), ("to", meta.le))
        if bound is not None
    ]
    return " " + " ".join(bounds)


def _either(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _without_none(hint: Any) -> tuple[Any, bool]:
    """The hint without `| None`, and whether it had that."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in get_args(hint) if part is not types.NoneType]
        return parts[0], True
    return hint, False
