"""The form of a training run: fields, defaults and checks are those of the argument dataclasses.

Free of Textual and torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from engine.checkpoint.sources import parse_source, resolve_cached
from engine.errors import ConfigError, JupiterError
from engine.model.config import ModelConfig
from engine.training.args import (
    GROUPS,
    Command,
    TrainArguments,
    arguments_of,
    model_source,
    notes,
    parse_arguments,
)
from engine.training.args_check import validate
from engine.training.args_fields import (
    Argument,
    PositiveInt,
    arg,
    arguments,
    expected,
    is_list,
    show,
)
from engine.training.args_parse import from_words
from engine.training.args_resolve import with_model
from engine.training.args_table import default_text, effect_text
from engine.training.row_files import KINDS
from engine.training.rows import parse_spec
from tui.run_folders import RunFolder

# fmt: off
ESSENTIAL = (
    "command", "model", "dataset", "val_dataset", "medusa_objective", "medusa_num_heads",
    "num_train_epochs", "train_iters", "global_batch_size", "max_length", "medusa_lr", "lr",
    "medusa_warmup_iters", "cache_hidden_states", "log_interval", "save", "load",
)
# fmt: on
FILES = ("dataset", "val_dataset", "generate", "batch_input")
RANKS = "NPROC_PER_NODE"
COMMAND = "command"
_PROBLEM = re.compile(r"--(\w+)(?: .*?)??: (.+)", re.DOTALL)
Values = Mapping[str, str]
"""What stands in the fields, by name; an empty text leaves a field at its default."""


@dataclass(frozen=True)
class _Launch:
    """What is said beside the arguments: before them, or through the environment."""

    command: Command = arg(
        "medusa",
        "medusa: trains heads; sft: the model itself, on answers; pt: the model, on every token",
    )

    NPROC_PER_NODE: PositiveInt | None = arg(
        None, "processes (ranks) on this machine; on GPUs one for each", shown="1"
    )


@dataclass(frozen=True)
class Field:
    """One argument as a field of a form."""

    argument: Argument

    @property
    def name(self) -> str:
        return self.argument.name

    @property
    def help(self) -> str:
        """What it does, in one sentence."""
        return effect_text(self.argument).replace("**", "").replace("`", "")

    @property
    def default(self) -> str:
        """What holds where the field is empty."""
        return default_text(self.argument).replace("`", "")

    @property
    def wants(self) -> str:
        """What a value must be."""
        return expected(self.argument.hint)

    @property
    def about(self) -> str:
        """What the field is for, and what may stand in it."""
        if self.choices:
            return self.help
        wants = "paths, set apart by spaces" if self.wants == "a list, each a text" else self.wants
        return self.help if wants == "a text" else f"{self.help} ({wants})"

    @property
    def choices(self) -> tuple[str, ...]:
        """The values there are; none where any text, number or list may stand."""
        if self.argument.only is not None:
            return tuple(show(value) for value in self.argument.only if value is not None)
        parts = get_args(self.argument.hint) or (self.argument.hint,)
        kinds = [part for part in (self.argument.hint, *parts) if part is bool]
        if kinds:
            return ("true", "false")
        for part in (self.argument.hint, *parts):
            if get_origin(part) is Literal:
                return tuple(map(show, get_args(part)))
        return ()

    def words(self, text: str) -> list[str]:
        """The text as words of a command line. Raises ConfigError."""
        if not is_list(self.argument):
            return [text.strip()]
        try:
            return shlex.split(text)
        except ValueError as error:
            raise ConfigError(f"--{self.name}: {error}; quote a path with spaces") from None

    def problem(self, text: str) -> str | None:
        """What is wrong with `text` in this field alone; None where nothing is."""
        if not text.strip():
            return None
        try:
            from_words(self.argument, f"--{self.name}", self.words(text))
        except ConfigError as error:
            return _told(str(error))[1]
        return None

    def text(self, value: Any) -> str:
        """How a value of args.json is written in the field; empty for the default."""
        if value is None or value == self.argument.default:
            return ""
        if isinstance(value, list):
            return shlex.join(map(show, value))
        return repr(value) if isinstance(value, float) else show(value)


def sections() -> list[tuple[str, list[Field]]]:
    """The form: what matters most, then all groups of arguments, each with what has an effect."""
    every = arguments(TrainArguments) | arguments(_Launch)
    known = {name: Field(argument) for name, argument in every.items()}
    first = [known[name] for name in ESSENTIAL]
    found = [("Run", first)]
    for title, group in GROUPS:
        fields = [
            known[name]
            for name in arguments(group)
            if name not in ESSENTIAL and _can_be_chosen(known[name].argument)
        ]
        if title == "Distributed":
            fields.insert(0, known[RANKS])
        if fields:
            found.append((title, fields))
    return found


def _can_be_chosen(argument: Argument) -> bool:
    """Whether there is more than one value that makes a difference."""
    if argument.only is None:
        return argument.instead is None
    return len([value for value in argument.only if value is not None]) > 1


@dataclass
class Checked:
    """What a form says: the words of the command, or what is wrong and where."""

    kind: Command = "medusa"
    words: list[str] = field(default_factory=list)
    """The arguments of that command."""
    ranks: int = 1
    errors: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    """Fields that have no effect beside the others, and why."""

    @property
    def command(self) -> str:
        """The command that does the same."""
        return shlex.join(["jupiter", self.kind, *self.words])


def command_of(values: Values) -> Command:
    """The command that a form is about."""
    text = values.get(COMMAND, "")
    return next((name for name in get_args(Command) if name == text), "medusa")


def fields_of(command: Command) -> frozenset[str]:
    """Names of the fields that a command has."""
    return frozenset(arguments_of(command)) | frozenset(arguments(_Launch))


def check(fields: Mapping[str, Field], values: Values) -> Checked:
    """Check a command's fields, each alone and against the others, the files and the model.

    What only the training itself can find out (a bad row, too little memory) is not among it.
    """
    checked = Checked(command_of(values))
    known = fields_of(checked.kind)
    for name, each in fields.items():
        text = values.get(name, "") if name in known and name != COMMAND else ""
        problem = each.problem(text)
        if problem is not None:
            checked.errors[name] = problem
        elif not text.strip():
            continue
        elif name == RANKS:
            checked.ranks = int(text)
        else:
            checked.words += [f"--{name}", *each.words(text)]
    if not checked.errors:
        try:
            args = _check_together(checked)
        except JupiterError as error:
            name, problem = _told(str(error))
            checked.errors[name if name in fields else "dataset"] = problem.partition("; see ")[0]
        else:
            _check_files(args, checked)
    return checked


def _check_together(checked: Checked) -> TrainArguments:
    args = parse_arguments(checked.words, checked.kind)
    validate(args, checked.ranks)
    for note in notes(args):
        name, why = _told(note)
        checked.notes[name] = why
    try:
        parse_source(model_source(args))
        folder = resolve_cached(model_source(args))
        if folder is not None:  # else the run fetches it first
            with_model(args, ModelConfig.from_folder(folder), folder)
    except JupiterError as error:
        if str(error).startswith("--"):
            raise
        checked.errors["config" if args.model is None else "model"] = str(error)
    return args


def _check_files(args: TrainArguments, checked: Checked) -> None:
    for name in FILES:
        named = getattr(args, name) or []
        for spec in [named] if isinstance(named, str) else named:
            try:
                path, _ = parse_spec(spec)
            except JupiterError as error:
                checked.errors[name] = str(error)
                continue
            if not path.is_file():
                checked.errors[name] = f"{path}: no such file"
            elif path.suffix.lower() not in KINDS.split(", "):
                checked.errors[name] = f"{path}: not a data file; the kinds are {KINDS}"
    if args.load is not None:
        load = Path(args.load).expanduser()
        parts = ("latest_checkpointed_iteration.txt", "metadata.json")
        if not any((load / part).is_file() for part in parts):
            checked.errors["load"] = f"{load}: holds no checkpoint; name a run folder"


def _told(message: str) -> tuple[str, str]:
    """The field that a message is about, and what it says of it."""
    matched = _PROBLEM.match(message)
    if matched:
        return matched[1], matched[2]
    effect = re.match(r"--(\w+) (has no effect here: .+)", message, re.DOTALL)
    return (effect[1], effect[2]) if effect else ("", message)


def at_field(message: str, fields: Mapping[str, Field], values: Values) -> tuple[str, str] | None:
    """The field that an error line of the command is about, and the problem; None for no field."""
    name, problem = _told(message)
    if name in fields:
        return name, problem
    for name in FILES:
        for word in values.get(name, "").split():
            path = word.partition("#")[0]
            if message.startswith((f"{path}:", f"{Path(path).expanduser()}:")):
                return name, message
    return None


def resumed(run: RunFolder, fields: Mapping[str, Field]) -> dict[str, str]:
    """The values for going on with a run: all that it was told, and its last checkpoint."""
    told = {COMMAND: run.kind, **run.args}
    values = {name: each.text(told[name]) for name, each in fields.items() if name in told}
    versions = run.args.get("add_version", True)
    return values | {
        "load": str(run.path),
        "save": str(run.path.parent if versions else run.path),
    }
