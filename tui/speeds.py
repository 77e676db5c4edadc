"""How fast the live stages were measured to be, gathered from the engine's updates. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from engine.planning.prediction import Measured, StageSpeed
from engine.protocol import EngineReady, EventEnvelope, Finished, StageTelemetry, Started

if TYPE_CHECKING:
    from engine.client import Update


@dataclass
class _StageRecord:
    """The telemetry of one stage, and the means over the latest answer that had any steps."""

    latest: StageTelemetry
    mark: StageTelemetry | None = None
    """As it was when the latest answer began."""
    speed: StageSpeed = field(init=False)

    def __post_init__(self) -> None:
        self.speed = StageSpeed(self.latest.layers, self.latest.device)
        self.take(self.latest)

    def take(self, new: StageTelemetry) -> None:
        """Figures of now; the means are over what was added since the mark."""
        self.latest, old = new, self.mark
        steps = new.decode_steps - (old.decode_steps if old else 0)
        rows = new.prefill_rows - (old.prefill_rows if old else 0)
        if steps > 0:
            busy_s = new.decode_busy_s - (old.decode_busy_s if old else 0.0)
            judge_s = new.decode_judge_s - (old.decode_judge_s if old else 0.0)
            self.speed = replace(self.speed, step_s=busy_s / steps, head_s=judge_s / steps)
        if rows > 0:
            busy_s = new.prefill_busy_s - (old.prefill_busy_s if old else 0.0)
            self.speed = replace(self.speed, row_s=busy_s / rows)


@dataclass(frozen=True)
class LiveFigures:
    """The engine that runs now; None and absent ranks where nothing was measured yet."""

    telemetry: dict[int, StageTelemetry]
    step_s: dict[int, float]
    """Seconds that a decode step computes on each stage."""
    ttft_s: float | None = None
    """Of the latest answer, as all below."""
    token_s: float | None = None
    """From one token to the next."""
    prompt_rows: int | None = None
    """Prompt tokens that were computed for it."""


class SpeedStore:
    """Takes every update of the engine; knows the live figures, and what to predict from.

    What was measured outlives a change of the split, until the new engine has been measured; a
    change of the model, its number format or its draft tree voids it.
    """

    def __init__(self) -> None:
        self._epoch: int | None = None
        self._kind: tuple[object, ...] = ()
        self._records: dict[int, _StageRecord] = {}
        self._finished: Finished | None = None
        self._moved = False
        """Layers have changed hands in this launch: counters go on from before."""
        self._before: Measured = Measured()
        """From the engine before this one."""

    def on_update(self, update: Update) -> None:
        """Learn from an update; those of no interest change nothing."""
        if not isinstance(update, EventEnvelope):
            return
        if update.epoch != self._epoch:
            self._before, self._epoch = self.measured(), update.epoch
            self._records, self._finished, self._moved = {}, None, False
        match update.body:
            case EngineReady() as ready:
                tree = "tuned" if ready.tree_tuned else ready.tree_size
                kind = (ready.model, ready.dtype, ready.medusa_num_heads, tree)
                if kind != self._kind:
                    self._kind, self._before = kind, Measured()
                split = dict(enumerate(ready.stages))
                if any(r.latest.layers != split.get(rank) for rank, r in self._records.items()):
                    self._begin_split()
            case StageTelemetry() as telemetry:
                self._take(update.rank, telemetry)
            case Started():
                for record in self._records.values():
                    record.mark = record.latest
            case Finished() as finished if finished.metrics.tokens_per_s:
                self._finished = finished

    def _take(self, rank: int, telemetry: StageTelemetry) -> None:
        record = self._records.get(rank)
        if record is not None and record.latest.layers != telemetry.layers:
            self._begin_split()
            record = None
        if record is None:
            mark = telemetry if self._moved else None
            self._records[rank] = _StageRecord(telemetry, mark)
        else:
            record.take(telemetry)

    def _begin_split(self) -> None:
        """Layers have moved between the running stages: what was measured was of another split."""
        self._before = self.measured()
        self._records, self._finished, self._moved = {}, None, True

    def live(self) -> LiveFigures:
        """What is measured of the engine that runs now."""
        records, finished = self._records, self._finished
        steps = {r: found.speed.step_s for r, found in sorted(records.items())}
        figures = LiveFigures(
            {rank: record.latest for rank, record in sorted(records.items())},
            {rank: step_s for rank, step_s in steps.items() if step_s is not None},
        )
        if finished is None or not finished.metrics.tokens_per_s:
            return figures
        return replace(
            figures,
            ttft_s=finished.metrics.ttft_s,
            token_s=1 / finished.metrics.tokens_per_s,
            prompt_rows=finished.prompt_tokens - finished.cached_tokens,
        )

    def measured(self) -> Measured:
        """What predictions rest on: of this engine where it was measured, else of the last."""
        before, live = self._before, self.live()
        stages = tuple(record.speed for _, record in sorted(self._records.items()))
        if not stages or any(stage.step_s is None or stage.row_s is None for stage in stages):
            return before
        metrics = self._finished.metrics if self._finished else None
        tokens_per_step = metrics.mean_accepted_len if metrics else None
        return Measured(
            stages=stages,
            link_s=_link_s(live, tokens_per_step, before.link_s),
            tokens_per_step=tokens_per_step or before.tokens_per_step,
            prompt_rows=live.prompt_rows or before.prompt_rows,
        )


def _link_s(live: LiveFigures, tokens_per_step: float | None, known: float | None) -> float | None:
    """One hop: what a step took from token to token beyond computing, shared by the hops.

    That is the way through the network and its software, waking up, and rank 0's bookkeeping. A
    single stage has no hops, so that what is known of them stays known.
    """
    hops = len(live.telemetry)
    if hops < 2 or live.token_s is None or not tokens_per_step:
        return known
    between = live.token_s * tokens_per_step - sum(live.step_s.values())
    return max(between, 0.0) / hops
