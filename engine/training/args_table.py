"""The arguments told to people: docs/training.md's tables and `--help`.

python -m engine.training.args_table          writes the tables into docs/training.md
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from engine.training.args import GROUPS
from engine.training.args_export import ExportArguments
from engine.training.args_fields import Argument, arguments, expected, show
from engine.training.args_infer import InferArguments
from engine.training.args_medusa import EvalArguments, GenerateArguments

BEGIN = "<!-- the tables below are written by `python -m engine.training.args_table` -->"
END = "<!-- end of the tables -->"
DOC = Path(__file__).parents[2] / "docs" / "training.md"
Groups = Sequence[tuple[str, type]]


def markdown() -> str:
    """The tables of all commands, group by group."""
    parts = [_table(f"### {title}", arguments(cls).values()) for title, cls in GROUPS]
    for name, cls in (("generate", GenerateArguments), ("eval", EvalArguments)):
        parts.append(_table(f"### `jupiter medusa {name}`", arguments(cls).values()))
    parts.append(_table("### `jupiter export`", arguments(ExportArguments).values()))
    parts.append(_table("### `jupiter infer`", arguments(InferArguments).values()))
    return "\n".join(parts)


def help_text(usage: str, summary: str, groups: Groups) -> str:
    """What `--help` prints."""
    lines = [f"usage: {usage}", "", summary]
    for title, cls in groups:
        lines += ["", f"{title}:"]
        for argument in arguments(cls).values():
            lines += _help_lines(argument)
    return "\n".join(lines)


def default_text(argument: Argument) -> str:
    """The default as people read it."""
    if argument.shown is not None:
        return argument.shown
    return f"`{show(argument.default)}`"


def effect_text(argument: Argument) -> str:
    """What an argument does here."""
    if argument.instead is not None:
        return f"{argument.help}: **no effect**; {argument.instead}"
    if argument.only is None:
        return argument.help
    honoured = " or ".join(f"`{show(value)}`" for value in argument.only if value is not None)
    only = f"only {honoured}" if honoured and argument.only != ([],) else "refused"
    return f"{argument.help}; **{only}**: {argument.because}"


def in_step(text: str) -> str:
    """The document with its tables as the dataclasses have them."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the document has no lines '{BEGIN}' and '{END}'")
    return f"{before}{BEGIN}\n\n{markdown()}\n{END}{after}"


def _table(title: str, rows: Iterable[Argument]) -> str:
    lines = [title, "", "| argument | default | value | what it does here |", "|---|---|---|---|"]
    for argument in rows:
        name = " or ".join(f"`{name}`" for name in (argument.name, *argument.also))
        value = expected(argument.hint)
        lines.append(f"| {name} | {default_text(argument)} | {value} | {effect_text(argument)} |")
    return "\n".join([*lines, ""])


def _help_lines(argument: Argument) -> list[str]:
    width = min(shutil.get_terminal_size().columns, 100)
    text = f"{effect_text(argument)} ({expected(argument.hint)}; {default_text(argument)})"
    text = text.replace("**", "").replace("`", "")
    indent = " " * 6
    wrapped = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
    return [f"  --{argument.name}", *wrapped]


def main() -> int:
    """Bring the document into step."""
    DOC.write_text(in_step(DOC.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
