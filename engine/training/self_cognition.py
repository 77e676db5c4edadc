"""Self-cognition data: rows that say {{NAME}} and {{AUTHOR}} where the model's own are to stand.

ms-swift's form: `--model_name` and `--model_author` take one value, or one for rows with the tag
"zh" and one for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from engine.errors import ConfigError
from engine.protocol import Message
from engine.training.rows import Row

NAME = "{{NAME}}"
AUTHOR = "{{AUTHOR}}"


@dataclass(frozen=True)
class Names:
    """What is put in the place of each placeholder, in Chinese rows and in others."""

    name: tuple[str, str] | None = None
    author: tuple[str, str] | None = None

    def fill(self, row: Row) -> Row:
        """The row with the placeholders that there is something for replaced."""
        found = {
            placeholder: values[row.tag != "zh"]
            for placeholder, values in ((NAME, self.name), (AUTHOR, self.author))
            if values is not None
        }

        def filled(text: str) -> str:
            for placeholder, value in found.items():
                text = text.replace(placeholder, value)
            return text

        messages = tuple(Message(m.role, filled(m.content)) for m in row.messages)
        return replace(row, messages=messages, text=None if row.text is None else filled(row.text))


def make_names(model_name: Sequence[str], model_author: Sequence[str]) -> Names:
    """The values of the two arguments.

    Raises:
        ConfigError: more than two values for one of them.
    """
    return Names(_pair("model_name", model_name), _pair("model_author", model_author))


def _pair(argument: str, values: Sequence[str]) -> tuple[str, str] | None:
    if len(values) > 2:
        given = " ".join(map(repr, values))
        raise ConfigError(
            f"--{argument} {given}: takes one value, or one for Chinese rows and one for the "
            "others; quote one with spaces"
        )
    return (values[0], values[-1]) if values else None


def fill_all(rows: Iterable[Row], names: Names, note: Callable[[str], None]) -> list[Row]:
    """All rows, filled; `note` is told of placeholders that stay and of names that nobody needs."""
    rows = list(rows)
    for placeholder, argument, values in (
        (NAME, "model_name", names.name),
        (AUTHOR, "model_author", names.author),
    ):
        count = sum(any(placeholder in text for text in _texts(row)) for row in rows)
        if count and values is None:
            note(f"{count} rows say {placeholder}, which stays as it is: --{argument} is not given")
        elif values is not None and not count:
            note(f"--{argument} has no effect: no row says {placeholder}")
    return list(map(names.fill, rows))


def _texts(row: Row) -> Iterator[str]:
    yield row.text or ""
    for message in row.messages:
        yield message.content
