"""`jupiter-tui --telemetry-json`: what the telemetry screen shows, as JSON lines for programs.

The lines are described in docs/telemetry.md. Free of torch and of Textual.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from contextlib import suppress
from typing import Any

from engine.client import ClientState, EngineClient, StateChanged, Update
from engine.config import JupiterConfig
from engine.errors import EngineError, ExitCode, JupiterError
from engine.nodes.hub import Hub
from engine.protocol import TreeChosen, TreeOption
from tui.batch_output import BatchOutput, ReaderGoneError
from tui.progress import Reporter, make_reporter
from tui.signals import ended_by_signals
from tui.telemetry import StageView, TelemetryStore, TelemetryView

INTERVAL_S = 1.0
LAST_LINE_S = 1.0
"""So long a reader that has stalled holds up the end of a batch."""
READER_GONE = 128 + signal.SIGPIPE
"""What a shell reports of any program that writes to a pipe which nobody reads."""


def main(args: argparse.Namespace, config: JupiterConfig, hub: Hub | None = None) -> int:
    """Start the engine of `config` and print lines until told to end; returns the exit code.

    Args:
        args: `telemetry_json`, `telemetry_interval` (seconds, or None for INTERVAL_S),
            `telemetry_lines` (or None for no end).
        config: the run.
        hub: has the other machines, if there are any.
    """
    reporter = make_reporter("auto", answers_on_terminal=True)
    try:
        invite(hub, reporter)
        caught = asyncio.run(_watch(args, config, reporter, hub))
    except ReaderGoneError:
        return READER_GONE
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except JupiterError as error:
        reporter.error(str(error))
        return error.exit_code
    return ExitCode.OK if caught is None else 128 + caught


def invite(hub: Hub | None, reporter: Reporter) -> None:
    """Say how other machines join, where some are to."""
    if hub is not None:
        others = "machine" if hub.machines == 2 else "machines"
        reporter.warn(f"on the other {others} run: {hub.invitation}")


async def _watch(
    args: argparse.Namespace, config: JupiterConfig, reporter: Reporter, hub: Hub | None
) -> int | None:
    """Print until all lines are out; the signal that ended it before, if one did."""
    lines = TelemetryLines(args.telemetry_interval or INTERVAL_S, args.telemetry_lines, reporter)
    died: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def listen(update: Update) -> None:
        lines.on_update(update)
        reporter.engine(update)
        match update:
            case StateChanged(state=ClientState.DEAD, reason=reason) if not died.done():
                died.set_result(reason)

    client = EngineClient(config, listener=listen, hub=hub)

    async def work() -> None:
        await client.start()
        printing = asyncio.create_task(lines.print_all())
        ends: set[asyncio.Future[Any]] = {printing, died}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not printing.done():
                raise EngineError(died.result())
            printing.result()
        finally:
            printing.cancel()

    task = asyncio.create_task(work())
    with ended_by_signals(task, client, reporter) as caught:
        try:
            await task
        except (asyncio.CancelledError, EngineError):
            if not caught:
                raise
        finally:
            await client.stop()
    return caught[0] if caught else None


class TelemetryLines:
    """Writes the figures of one engine to standard output, a line every `interval_s` seconds.

    Args:
        interval_s: seconds between two lines.
        limit: stop after so many lines; None for no end.
        reporter: where it is said that nothing can be written.
    """

    def __init__(self, interval_s: float, limit: int | None, reporter: Reporter) -> None:
        self._interval_s = interval_s
        self._limit = limit
        self._reporter = reporter
        self._store = TelemetryStore()
        self._began = time.monotonic()
        self._printed = 0
        self._output: BatchOutput | None = None

    @classmethod
    def wanted(cls, args: argparse.Namespace, reporter: Reporter) -> TelemetryLines | None:
        """For the command line of a batch; None where it asks for no telemetry."""
        if not args.telemetry_json:
            return None
        return cls(args.telemetry_interval or INTERVAL_S, args.telemetry_lines, reporter)

    def on_update(self, update: Update) -> None:
        """Take an update of the engine client."""
        self._store.on_update(update)

    async def print_all(self) -> None:
        """Print until the limit is reached; begins once the engine is ready.

        Raises ReaderGoneError where nobody reads any more, OutputLostError on a full disk.
        """
        with BatchOutput(None, "-", resume=False) as self._output:
            self._output.begin([])
            while self._limit is None or self._printed < self._limit:
                await asyncio.sleep(self._interval_s)
                await self._print()

    async def _print(self) -> None:
        view = self._store.view()
        if view.model is None or self._output is None or self._printed == self._limit:
            return
        elapsed_s = time.monotonic() - self._began
        record = as_json(view, time_unix_s=time.time(), elapsed_s=elapsed_s)
        await self._output.write(json.dumps(record).encode() + b"\n")
        self._printed += 1

    async def beside(self, work: asyncio.Task[None]) -> None:
        """Wait for `work`, printing meanwhile, and once more at its end; raises what it raises.

        The work is what counts: where nobody reads the lines any more, it goes on without them.
        """
        printing = asyncio.ensure_future(self._print_beside())
        try:
            await work
            if not printing.done():
                with suppress(ReaderGoneError, JupiterError, TimeoutError):
                    await asyncio.wait_for(self._print(), LAST_LINE_S)
        finally:
            printing.cancel()
            await asyncio.gather(printing, return_exceptions=True)

    async def _print_beside(self) -> None:
        try:
            await self.print_all()
        except ReaderGoneError:
            return
        except JupiterError as error:
            self._reporter.warn(str(error))


def as_json(view: TelemetryView, *, time_unix_s: float, elapsed_s: float) -> dict[str, Any]:
    """One line's object; None where nothing was measured.

    Args:
        view: the figures.
        time_unix_s: the time of day.
        elapsed_s: since the program began to collect.
    """
    return {
        "time_unix_s": round(time_unix_s, 3),
        "elapsed_s": round(elapsed_s, 3),
        "model": view.model,
        "state": view.state,
        "requests_running": view.running,
        "requests_finished": view.finished,
        "tokens": view.tokens,
        "tokens_per_s": _rounded(view.tokens_per_s, 3),
        "ttft_last_s": _rounded(view.ttft_s, 6),
        "ttft_median_s": _rounded(view.ttft_median_s, 6),
        "tree": None if view.tree is None else tree_json(view.tree),
        "stages": [stage_json(stage) for stage in view.stages],
    }


def tree_json(tree: TreeChosen) -> dict[str, Any]:
    """The tuner's choice, and what it was weighed against."""
    return {
        "nodes": tree.nodes,
        "depth": tree.depth,
        "sequences": tree.sequences,
        **_promise(tree.chosen, tree.sequences),
        "options": [{"nodes": o.nodes, **_promise(o, tree.sequences)} for o in tree.options],
    }


def _promise(option: TreeOption, sequences: int) -> dict[str, float]:
    return {
        "tokens_per_step": round(option.tokens_per_step, 3),
        "step_ms": round(option.step_ms, 3),
        "tokens_per_s": round(1000.0 * sequences * option.tokens_per_step / option.step_ms, 3),
    }


def stage_json(stage: StageView) -> dict[str, Any]:
    """The figures of one stage; None where nothing was measured."""
    sample, shares = stage.sample, stage.shares
    return {
        "rank": stage.rank,
        "first_layer": stage.first_layer,
        "layers": stage.layers,
        "pid": stage.pid,
        "node": stage.node or None,
        "phase": stage.phase,
        "contact": stage.contact,
        "age_s": _rounded(stage.age_s, 3),
        "device": sample.device if sample else None,
        "device_name": sample.device_name if sample else None,
        "memory_kind": sample.memory_kind if sample else None,
        "memory_bytes": sample.memory_bytes if sample else None,
        "memory_total_bytes": sample.memory_total_bytes if sample else None,
        "weights_bytes": sample.weights_bytes if sample else None,
        "kv_bytes": sample.kv_bytes if sample else None,
        "busy_share": _rounded(shares.busy if shares else None, 4),
        "wait_share": _rounded(shares.wait if shares else None, 4),
        "link_share": _rounded(shares.link if shares else None, 4),
        "idle_share": _rounded(shares.idle if shares else None, 4),
        "busy_s": _rounded(sample.busy_s if sample else None, 6),
        "wait_s": _rounded(sample.wait_s if sample else None, 6),
        "link_s": _rounded(sample.link_s if sample else None, 6),
        "idle_s": _rounded(sample.idle_s if sample else None, 6),
        "steps": sample.steps if sample else None,
        "rows": sample.rows if sample else None,
        "rows_per_s": _rounded(stage.rows_per_s, 3),
        "decode_steps": sample.decode_steps if sample else None,
        "decode_busy_s": _rounded(sample.decode_busy_s if sample else None, 6),
        "decode_judge_s": _rounded(sample.decode_judge_s if sample else None, 6),
        "decode_step_ms": _rounded(stage.decode_step_ms, 4),
        "link_step_ms": _rounded(stage.link_step_ms, 4),
        "link_dtype": (sample.link_dtype or None) if sample else None,
        "link_step_bytes": _rounded(stage.link_step_bytes, 1),
        "prefill_rows": sample.prefill_rows if sample else None,
        "prefill_busy_s": _rounded(sample.prefill_busy_s if sample else None, 6),
        "prefill_tokens_per_s": _rounded(stage.prefill_tokens_per_s, 3),
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
