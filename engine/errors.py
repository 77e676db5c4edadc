"""The errors a user may see, and the exit codes of every command."""

from __future__ import annotations

from enum import IntEnum
from typing import Literal


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
