"""`jupiter-tui --batch`: a file of requests through the engine, its answers as JSON lines.

Everything is checked before the engine starts; then a bounded number of requests is under way at
any time, and each answer is on the disk's side of the file system before the next is waited for.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec

from engine.client import ClientState, EngineClient, StateChanged, Update
from engine.config import JupiterConfig
from engine.decoding.outline import Parts
from engine.errors import EngineError, ExitCode, JupiterError
from engine.nodes.hub import Hub
from engine.protocol import EngineReady, Failed, Finished, Tokens
from tui.batch_input import BatchInputError, BatchRequest, parse_requests
from tui.batch_lines import Plan, answer_line, failure_line, plan_resume
from tui.batch_output import BatchOutput, ReaderGoneError
from tui.progress import Reporter, Tally, make_reporter
from tui.signals import ended_by_signals
from tui.telemetry_json import TelemetryLines, invite

QUEUE_AHEAD = 4
"""Requests that wait in the engine, so that a place that falls free is taken at once."""
READER_GONE = 128 + signal.SIGPIPE
"""What a shell reports of any program that writes to a pipe which nobody reads."""


class _EnoughError(Exception):
    """As many lines have failed as --max-failures allows."""


def main(args: argparse.Namespace, config: JupiterConfig, hub: Hub | None = None) -> int:
    """Run a batch; returns the exit code (see ExitCode and docs/batch.md).

    Args:
        args: `batch` (input path or "-"), `output` (path, None or "-"), `resume`, `progress`,
            `max_failures` (or None), `max_num_seqs` (or None for the config's), and those of
            `tui.telemetry_json`: with `telemetry_json` its lines go to standard output meanwhile.
        config: the run.
        hub: has the other machines, if there are any.
    """
    if args.max_num_seqs is not None:
        config = msgspec.structs.replace(config, max_num_seqs=args.max_num_seqs)
    to_stdout = args.output in (None, "-")
    reporter = make_reporter(args.progress, answers_on_terminal=to_stdout and _is_terminal(1))
    try:
        with BatchOutput(args.output, args.batch, resume=args.resume) as output:
            requests = parse_requests(*_read(args.batch, reporter))
            plan = plan_resume(output.name, output.old_lines, requests)
            for line in plan.strangers:
                reporter.warn(f"{output.name}: {line.custom_id!r} is not in the input; kept")
            telemetry = TelemetryLines.wanted(args, reporter)
            batch = Batch(config, plan, output, reporter, args.max_failures, telemetry, hub)
            invite(hub, reporter)
            batch.tally.skipped = len(requests) - len(plan.todo)
            return batch.run()
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except JupiterError as error:
        reporter.error(str(error))
        return error.exit_code
    finally:
        reporter.close()


def _read(source: str, reporter: Reporter) -> tuple[str, bytes]:
    """The name of the input, for errors, and all of it."""
    if source != "-":
        try:
            return source, Path(source).read_bytes()
        except OSError as error:
            raise BatchInputError(f"{source}: {error.strerror}") from None
    if _is_terminal(0):
        reporter.note("reading requests from the terminal; Ctrl+D ends them")
    try:
        with open(0, "rb", closefd=False) as stdin:
            return "standard input", stdin.read()
    except OSError as error:
        raise BatchInputError(f"standard input: {error.strerror}") from None


def _is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


class Batch:
    """One run over the requests that are left to do."""

    def __init__(
        self,
        config: JupiterConfig,
        plan: Plan,
        output: BatchOutput,
        reporter: Reporter,
        max_failures: int | None = None,
        telemetry: TelemetryLines | None = None,
        hub: Hub | None = None,
    ) -> None:
        self.tally = Tally(todo=len(plan.todo))
        self._config = config
        self._plan = plan
        self._output = output
        self._reporter = reporter
        self._max_failures = max_failures
        self._telemetry = telemetry
        self._hub = hub
        self._began = False
        self._death = ""

    def run(self) -> int:
        """Ask everything, write every answer, say what was done; returns the exit code."""
        code, problem = self._outcome()
        if code == READER_GONE:
            return code  # quietly, as any program at the head of a pipe
        if self._began:
            self._reporter.summary(self.tally)
        if problem:
            self._reporter.error(problem)
            if self._began and not self._output.is_stdout:
                name = self._output.name
                self._reporter.note(f"what is done is in {name}; --resume goes on with it")
        return code

    def _outcome(self) -> tuple[int, str]:
        """Do the work; exit code and, where it ended early, why."""
        try:
            if self._plan.todo:
                caught = asyncio.run(self._serve())
            else:
                self._output.begin(self._plan.keep)
                self._began, caught = True, None
        except ReaderGoneError:
            return READER_GONE, ""
        except _EnoughError:
            return ExitCode.SOME_FAILED, f"stopped after {self.tally.failed} failed lines"
        except EngineError as error:
            # The cause, rather than what a request met while the engine was going down.
            return error.exit_code, self._death or str(error)
        except JupiterError as error:
            return error.exit_code, str(error)
        if caught is not None:
            return 128 + caught, f"stopped by {signal.Signals(caught).name}"
        return (ExitCode.SOME_FAILED if self.tally.failed else ExitCode.OK), ""

    def _on_update(self, update: Update) -> None:
        if isinstance(update, StateChanged) and update.state is ClientState.DEAD:
            self._death = update.reason
        if self._telemetry is not None:
            self._telemetry.on_update(update)
        self._reporter.engine(update)

    async def _serve(self) -> int | None:
        """Work until all is done; the signal that ended it before, if one did."""
        client = EngineClient(self._config, listener=self._on_update, hub=self._hub)
        work = asyncio.create_task(self._answer_all(client))
        with ended_by_signals(work, client, self._reporter) as caught:
            try:
                if self._telemetry is None:
                    await work
                else:
                    await self._telemetry.beside(work)
            except (asyncio.CancelledError, EngineError):
                if not caught:
                    raise
            finally:
                try:
                    self._output.sync()
                finally:
                    await client.stop()
        return caught[0] if caught else None

    async def _answer_all(self, client: EngineClient) -> None:
        ready = await client.start()
        self._output.begin(self._plan.keep)
        self._began = True
        self.tally.restart()
        self._reporter.start(self.tally)
        pending = iter(self._plan.todo)
        width = min(self._config.max_num_seqs + QUEUE_AHEAD, self.tally.todo)
        askers = [
            asyncio.create_task(self._answer_some(client, ready, pending)) for _ in range(width)
        ]
        try:
            done, _ = await asyncio.wait(askers, return_when=asyncio.FIRST_EXCEPTION)
            for asker in done:
                asker.result()
        except EngineError:
            # The others first take the answers that arrived before the end.
            await asyncio.wait(askers)
            raise
        finally:
            for asker in askers:
                asker.cancel()
            await asyncio.gather(*askers, return_exceptions=True)

    async def _answer_some(
        self, client: EngineClient, ready: EngineReady, pending: Iterator[BatchRequest]
    ) -> None:
        """Take requests one after another until none is left."""
        for request in pending:
            failure = await self._answer(client, ready, request)
            self._reporter.line(self.tally, request, failure)
            if failure is not None and self.tally.failed == self._max_failures:
                raise _EnoughError

    async def _answer(
        self, client: EngineClient, ready: EngineReady, request: BatchRequest
    ) -> str | None:
        """Ask one request and write its line; why it failed, if it did."""
        stream = client.submit(
            messages=request.messages, prompt=request.prompt, params=request.params
        )
        parts = Parts()
        code, failure = "internal_error", "the engine gave no answer"
        async for event in stream:
            if isinstance(event, Tokens):
                parts.add(event.point, event.text)
                self.tally.streamed += len(event.token_ids)
                self._reporter.tokens(self.tally)
            elif isinstance(event, Failed):
                code, failure = event.code, event.message
            elif isinstance(event, Finished) and event.finish_reason == "cancelled":
                code, failure = "cancelled", "the engine cancelled it"
            elif isinstance(event, Finished):
                await self._output.write(
                    answer_line(
                        request, parts.text, event, ready=ready, request_id=stream.request_id
                    )
                )
                self.tally.done += 1
                self.tally.tokens += event.completion_tokens
                return None
        await self._output.write(failure_line(request, code, failure))
        self.tally.failed += 1
        return failure
