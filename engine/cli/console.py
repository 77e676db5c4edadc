"""Prompts in, answers out, for engines that run in this very process (`run` and `stage`)."""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from engine.errors import ExitCode, JupiterError
from engine.protocol import (
    Event,
    Failed,
    Finished,
    Generate,
    Message,
    Notice,
    SamplingParams,
    Shutdown,
    Tokens,
)


class Console:
    """Feeds prompts to a scheduler's inbox one after the other and prints the answers.

    Answers go to stdout as they are written, figures and complaints to stderr.
    """

    def __init__(self, prompts: Iterable[str], params: SamplingParams, *, raw: bool) -> None:
        self.prompts, self.params, self.raw = prompts, params, raw
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.exit_code = ExitCode.OK
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin to feed; the scheduler stops when the prompts are through."""
        threading.Thread(target=self._feed, name="jupiter-console", daemon=True).start()

    def emit(self, event: Event) -> None:
        """Show an event; called by the scheduler."""
        match event:
            case Tokens():
                print(event.text, end="", flush=True)
            case Finished():
                print(flush=True)
                print(figures(event), file=sys.stderr)
                self._ended.set()
            case Failed():
                print(f"jupiter: {event.message}", file=sys.stderr)
                self.exit_code = ExitCode.SOME_FAILED
                self._ended.set()
            case Notice():
                print(f"jupiter: {event.message}", file=sys.stderr)

    def run(self, command: str, work: Callable[[], None]) -> NoReturn:
        """Do the work of this process and leave it straight, with the exit code that fits.

        At an ordinary exit Python stumbles over threads that still wait for a line of input or
        in a receive.
        """
        code = ExitCode.ENGINE_FAILED
        try:
            work()
            code = self.exit_code
        except JupiterError as error:
            print(f"jupiter {command}: {error}", file=sys.stderr)
            code = error.exit_code
        except KeyboardInterrupt:
            code = ExitCode.INTERRUPTED
        except Exception:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _feed(self) -> None:
        for number, text in enumerate(self.prompts):
            self._ended.clear()
            self.inbox.put(
                Generate(
                    request_id=str(number),
                    messages=None if self.raw else (Message("user", text),),
                    prompt=text if self.raw else None,
                    params=self.params,
                )
            )
            self._ended.wait()
        self.inbox.put(Shutdown())


def prompts_from_stdin() -> Iterable[str]:
    """The lines of stdin that are not blank, asked for with a prompt on a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def figures(done: Finished) -> str:
    """What an answer cost, in one line for people; what is unknown is n/a."""

    def figure(value: float | None, form: str) -> str:
        return "n/a" if value is None else form.format(value)

    metrics = done.metrics
    return (
        f"[{done.finish_reason}: {done.completion_tokens} tokens, "
        f"first after {figure(metrics.ttft_s, '{:.2f} s')}, "
        f"{figure(metrics.tokens_per_s, '{:.1f}')} tokens/s, "
        f"{figure(metrics.mean_accepted_len, '{:.2f}')} tokens per step]"
    )
