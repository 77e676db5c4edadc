"""Records of data files, each with the line that it begins on: JSONL, JSON, CSV, plain text."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from engine.errors import JupiterError

KINDS = ".jsonl, .json, .csv, .txt"
Record = tuple[int, Any]
"""Line from 1, and what stands there: an object, or a text."""


class DataError(JupiterError):
    """A data file or row that cannot be used; file and line are named."""


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, in its order; the suffix says of what kind it is.

    JSONL: a JSON object per line. JSON: a list of objects. CSV: a header, then rows; an empty
    cell is a missing key. Plain text: paragraphs, set apart by blank lines.

    Raises:
        DataError: the file is missing, of another kind, or damaged; the line is named.
    """
    readers: dict[str, Callable[[Path, Iterator[str]], Iterator[Record]]] = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".txt": _paragraphs,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: not a data file; the kinds are {KINDS}")
    return reader(path, _lines(path))


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file with their ends, read as they are asked for.

    Only a line feed ends a line: JSON text may hold other Unicode line ends.
    """
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: line {number}: not UTF-8") from None


def _jsonl(path: Path, lines: Iterator[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _parse(path, number, line.rstrip("\r\n"))


def _parse(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {number}: not JSON: {error.msg} (column {error.colno})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line {number}: not JSON that can be read: {error}") from None


def _json(path: Path, lines: Iterator[str]) -> Iterator[Record]:
    """The elements of one list; a file of JSON lines by this name is understood, too."""
    text = "".join(lines)
    if not text.lstrip().startswith("["):
        yield from _jsonl(path, iter(text.split("\n")))
        return
    decoder, at, line = json.JSONDecoder(), text.index("[") + 1, 1
    counted = 0
    blank = re.compile(r"[ \t\r\n]*")

    def skip(position: int) -> int:
        found = blank.match(text, position)
        return found.end() if found else position

    at = skip(at)
    while not text.startswith("]", at):
        line += text.count("\n", counted, at)
        counted = at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            problem = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise DataError(f"{path}: line {line}: not JSON: {problem}") from None
        yield line, value
        at = skip(at)
        if text.startswith(",", at):
            at = skip(at + 1)
        elif not text.startswith("]", at):
            line += text.count("\n", counted, at)
            raise DataError(f"{path}: line {line}: not JSON: ',' or ']' expected")
    if text[at + 1 :].strip():
        raise DataError(f"{path}: not JSON: there is more after the list")


def _csv(path: Path, lines: Iterator[str]) -> Iterator[Record]:
    reader = csv.reader(lines, strict=True)
    names: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if names is None:
                names = cells
            elif cells:
                if len(cells) != len(names):
                    raise DataError(
                        f"{path}: line {line}: {len(cells)} cells, the header has {len(names)}"
                    )
                yield line, {name: cell for name, cell in zip(names, cells, strict=True) if cell}
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}: line {line}: not CSV: {error}") from None


def _paragraphs(path: Path, lines: Iterator[str]) -> Iterator[Record]:
    found: list[str] = []
    for number, line in enumerate(chain(lines, [""]), start=1):
        if line.strip():
            found.append(line.rstrip("\r\n"))
        elif found:
            yield number - len(found), "\n".join(found)
            found = []
