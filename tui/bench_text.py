"""What `jupiter bench ui` streams: mixed Markdown, with marks that can be found on a screen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count

MARK = re.compile(r"m\d{5}")
_TOKEN = re.compile(r"\s*(?:m\d{5}|\w{1,8}|[^\w\s])|\s+")


def document(code_lines: int) -> str:
    """Headings, paragraphs, lists, a table and one long code block; a numbered mark in each line.

    The marks (`m00001`, ...) come in their order.
    """
    marks = (f"m{number:05d}" for number in count(1))
    lines = [*_prose(marks, sections=2), *_code(marks, code_lines), *_prose(marks, sections=2)]
    return "\n".join(lines)


def tokens(text: str) -> list[str]:
    """`text` in pieces of a few letters, as a model's tokens are; a mark is one piece."""
    return _TOKEN.findall(text)


def _prose(marks: Iterator[str], *, sections: int) -> Iterator[str]:
    for section in range(1, sections + 1):
        yield from (f"## Section {next(marks)}", "")
        for _ in range(2):
            yield " ".join(
                f"A stage holds **some layers** and `passes on` what {next(marks)} they say, "
                "one step behind the other, until the last of them has *judged* it."
                for _ in range(4)
            )
            yield ""
        for item in range(1, 13):
            yield f"{item}. The item {next(marks)} of a list with **bold** words and `code` in it"
        yield ""
        for _ in range(8):
            yield f"- A point {next(marks)} of the list"
            yield f"  - and what {next(marks)} belongs to it"
        yield from ("", "| stage | layers | mark |", "|---|---|---|")
        for row in range(4):
            yield f"| {row} | {row * 5} | {next(marks)} |"
        yield from ("", f"> Section {section} ends with {next(marks)}, a quotation.", "")


def _code(marks: Iterator[str], lines: int) -> Iterator[str]:
    yield from ("Here is the whole program:", "", "```python")
    body = [
        "def step_{0}(rows: list[int], {0}: int = {1}) -> int:",
        '    """Pass the rows on and count them."""',
        "    total = sum(row * {0} for row in rows)  # in one go",
        "    if total > {1} and rows:",
        '        print(f"step {0}: {{total}} of {1}")',
        "    {0} = total % 7",
        "    return total + {0}",
        "# {0}",
    ]
    for number in range(lines):
        yield body[number % len(body)].format(next(marks), number)
    yield from ("```", "")
