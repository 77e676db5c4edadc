"""The errors a user may see, and the exit codes of every command."""

from __future__ import annotations

import json
from enum import IntEnum
from typing import Any, Literal

SHOWN = 60
"""Characters of a value that an error shows."""


class ExitCode(IntEnum):
    """Exit codes of `jupiter` and `jupiter-tui`; the README's table documents them."""

    OK = 0
    SOME_FAILED = 1
    """Some batch lines failed; the others are done and written."""
    BAD_INPUT = 2
    """Bad usage, configuration, checkpoint or input file; nothing ran."""
    ENGINE_FAILED = 3
    """The engine did not start, or died while working."""
    STAGE_LOST = 4
    """Of a worker: it lost its neighbour, which is the one to look at."""
    INTERRUPTED = 130
    TERMINATED = 143


class JupiterError(Exception):
    """An error to show as one line, without a traceback.

    The message names what is wrong (file, key or line) and what would be right.
    """

    exit_code = ExitCode.BAD_INPUT


def shown(value: Any) -> str:
    """A value for an error's line, as JSON where it has such a form, cut to SHOWN characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return cut(text, SHOWN)


def cut(text: str, length: int = 200) -> str:
    """`text`, or as much of it as a line of an error may take."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def harmless(text: str, kept: str = "") -> str:
    """`text` without what a terminal may take for orders; the characters of `kept` stay."""
    return "".join(c if c.isprintable() or c in kept else "\ufffd" for c in text)


class ConfigError(JupiterError):
    """A configuration file, flag or value that cannot be used."""


class CheckpointError(JupiterError):
    """Model or head files that are missing, damaged or of an unsupported kind."""


class PromptError(JupiterError):
    """A prompt that cannot be answered, such as one that the chat template refuses."""

    code: Literal["prompt_too_long", "invalid_request"] = "invalid_request"


class PromptTooLongError(PromptError):
    """A prompt that leaves no room for an answer in the context."""

    code = "prompt_too_long"


class EngineError(JupiterError):
    """The engine could not start or has stopped; the message carries rank and log lines."""

    exit_code = ExitCode.ENGINE_FAILED


class StageLostError(EngineError):
    """A neighbouring stage is gone: the cause is to be found there, not here."""

    exit_code = ExitCode.STAGE_LOST
