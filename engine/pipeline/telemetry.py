"""Sends a stage's own figures at a fixed pace, whatever its main thread is doing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from engine.pipeline.memory import device_name, memory_bytes, memory_total_bytes, weights_bytes
from engine.pipeline.stage import Stage
from engine.protocol import TELEMETRY_INTERVAL_S, StageSpans, StageTelemetry


class TelemetrySender:
    """While it is open, a thread emits a StageTelemetry every TELEMETRY_INTERVAL_S seconds.

    A thread of its own: an idle stage and one in the middle of a long step are heard as well, so
    that silence means trouble.
    """

    def __init__(self, stage: Stage, emit: Callable[[StageTelemetry | StageSpans], None]) -> None:
        self._stage, self._emit = stage, emit
        self._total = memory_total_bytes(stage.device)
        self._name = device_name(stage.device)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jupiter-telemetry", daemon=True)

    def __enter__(self) -> TelemetrySender:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        self._emit(self.sample())
        steps = 0
        while not self._closed.wait(TELEMETRY_INTERVAL_S):
            self._emit(self.sample())
            if steps != (steps := self._stage.meter.steps):
                self._emit(StageSpans(self._stage.meter.spans()))

    def sample(self) -> StageTelemetry:
        """The figures of this moment."""
        stage, meter = self._stage, self._stage.meter
        spent = meter.spent()
        return StageTelemetry(
            layers=stage.store.num_layers,
            device=str(stage.device),
            device_name=self._name,
            memory_bytes=memory_bytes(stage.device),
            memory_kind="device" if stage.device.type == "cuda" else "process",
            memory_total_bytes=self._total,
            weights_bytes=weights_bytes(stage),
            kv_bytes=stage.store.nbytes,
            busy_s=spent.busy,
            wait_s=spent.wait,
            link_s=spent.link,
            idle_s=spent.idle,
            link_dtype=meter.link_dtype,
            sent_bytes=meter.sent_bytes,
            steps=meter.steps,
            rows=meter.rows,
            decode_steps=meter.decode_steps,
            decode_busy_s=meter.decode_busy_s,
            decode_judge_s=meter.decode_judge_s,
            prefill_rows=meter.prefill_rows,
            prefill_busy_s=meter.prefill_busy_s,
            doing=meter.doing,
            progress=meter.moved + stage.forward.progress,
            patience_s=stage.patience_s,
        )
