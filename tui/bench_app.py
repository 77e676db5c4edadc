"""The workbench with an engine that is played, for `jupiter bench ui`; see tui/bench_ui.py."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine.config import JupiterConfig
from engine.protocol import (
    PROTOCOL_VERSION,
    EngineReady,
    EventEnvelope,
    Finished,
    Generate,
    Metrics,
    SamplingParams,
    Started,
    Tokens,
)
from engine.request import RequestStream
from engine.updates import Update
from tui.bench_text import document, tokens
from tui.terminal import run

PROBE_S = 0.005
"""The event loop is asked to wake up after so long, again and again; its lag is the delay."""
READY = EngineReady(
    model="bench",
    stages=(15, 15),
    device="none",
    dtype="float32",
    medusa_num_heads=0,
    tree_size=1,
    context_length=1 << 16,
    has_chat_template=True,
)


class Player:
    """In the place of an engine's client: answers with the document, at a steady rate."""

    def __init__(
        self,
        config: JupiterConfig,
        listener: Callable[[Update], None],
        rate: float,
        code_lines: int,
        report: Path,
    ) -> None:
        self.config = config
        self._tell = listener
        self._rate = rate
        self._pieces = tokens(document(code_lines))
        self._report = report
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> EngineReady:
        """Be ready at once."""
        self._tell(EventEnvelope(PROTOCOL_VERSION, 1, 0, READY))
        return READY

    def submit(self, *, prompt: str, params: SamplingParams) -> RequestStream:
        """Part of a client; nothing asks so here."""
        raise NotImplementedError

    def send(self, request: Generate) -> RequestStream:
        """Begin to play."""
        stream = RequestStream(request.request_id)
        self._tasks.append(asyncio.create_task(self._play(stream)))
        return stream

    def cancel(self, request_id: str) -> None:
        """Part of a client; nobody stops this answer."""

    async def resplit(self, config: JupiterConfig) -> EngineReady:
        """There are no stages to share layers out to."""
        return await self.start()

    def log_path(self, rank: int) -> Path | None:
        """There are no stages."""
        return None

    async def stop(self) -> None:
        """End with the workbench."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def kill_now(self) -> None:
        """There are no processes."""

    async def _play(self, stream: RequestStream) -> None:
        name = stream.request_id
        stream.put(Started(request_id=name, prompt_tokens=1, cached_tokens=0))
        lags: list[float] = []
        probe = asyncio.create_task(_probe(lags))
        began_at, cpu = time.monotonic(), time.process_time()
        for index, piece in enumerate(self._pieces):
            due = began_at + index / self._rate - time.monotonic()
            if due > 0:
                await asyncio.sleep(due)
            stream.put(Tokens(request_id=name, token_ids=(index,), text=piece))
        spent = (time.process_time() - cpu) / (time.monotonic() - began_at)
        probe.cancel()
        stream.put(
            Finished(
                request_id=name,
                finish_reason="stop",
                context_full=False,
                prompt_tokens=1,
                cached_tokens=0,
                completion_tokens=len(self._pieces),
                metrics=Metrics(),
            )
        )
        percentiles = statistics.quantiles(lags, n=100)
        figures = {
            "lag_p50_ms": round(percentiles[49] * 1000, 1),
            "lag_p99_ms": round(percentiles[98] * 1000, 1),
            "cpu_share": round(spent, 3),
            "began_at": began_at,
        }
        self._report.write_text(json.dumps(figures))


async def _probe(lags: list[float]) -> None:
    while True:
        asked = time.monotonic()
        await asyncio.sleep(PROBE_S)
        lags.append(time.monotonic() - asked - PROBE_S)


def main(rate: str, code_lines: str, report: str) -> int:
    """Run the workbench on this terminal until it is quit; the figures go to `report`."""
    config = JupiterConfig(base_model_name_or_path="bench", stage_num_hidden_layers_list=[15, 15])
    return run(
        config,
        make_client=lambda config, listener: Player(
            config, listener, float(rate), int(code_lines), Path(report)
        ),
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
