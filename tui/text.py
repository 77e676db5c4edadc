"""Text from a model, a log or a paste, made harmless to a terminal."""

from __future__ import annotations

import re
from pathlib import Path

from engine.protocol import NODE_PIDS

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")

# Control characters become visible signs of their own, so that nothing is hidden and nothing is
# obeyed. Line and paragraph separators become new lines: Python and Markdown must agree on lines.
_VISIBLE: dict[int, str | None] = {code: chr(0x2400 + code) for code in range(0x20)}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), "\ufffd")
_VISIBLE |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")
_VISIBLE |= {0x7F: "\u2421", 0x2028: "\n", 0x2029: "\n"}
for _kept in "\n\t":
    del _VISIBLE[ord(_kept)]
_VISIBLE[ord("\r")] = None


def harmless(text: str) -> str:
    """`text` with control and direction characters made visible; new lines and tabs stay.

    It works on any piece of a stream: each character is judged alone.
    """
    return text.translate(_VISIBLE)


def log_text(text: str) -> str:
    """Lines of a log for people: colour codes are taken out, the rest is made harmless."""
    return harmless(_ANSI.sub("", text))


def process(pid: int, node: str) -> str:
    """A worker's process for people, and the machine where it is another one."""
    return f"pid {pid % NODE_PIDS}{f' on {harmless(node)}' if node else ''}"


def pasted(text: str) -> str:
    """Pasted text with every kind of line end as a new line, and made harmless."""
    return harmless(text.replace("\r\n", "\n").replace("\r", "\n"))


def short_path(path: Path) -> str:
    """`path` for people: from the current folder where it is below it, else from `~`."""
    for base, sign in ((Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(base) and path != base:
            return f"{sign}{path.relative_to(base)}"
    return str(path)
