"""The engine as the screens see it: one frozen snapshot, and how an update changes it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal

from engine.config import JupiterConfig
from engine.protocol import EngineReady, StageState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.client import Update

Phase = Literal["starting", "ready", "stopping", "failed"]


@dataclass(frozen=True)
class Snapshot:
    """What is known of the engine at one moment; times are seconds of a monotonic clock."""

    model: str
    split: tuple[int, ...]
    dtype: str
    phase: Phase = "starting"
    launch: int = 0
    """Counts the launches of this session, from 1; 0 before the first."""
    detail: str = ""
    """What the start is busy with, or why the engine failed."""
    stages: Mapping[int, StageState] = field(default_factory=dict)
    ready: EngineReady | None = None
    began_at: float | None = None
    ready_after_s: float | None = None

    @classmethod
    def before_launch(cls, config: JupiterConfig) -> Snapshot:
        """What the configuration alone tells."""
        return cls(
            model=short_name(config.base_model_name_or_path),
            split=tuple(config.stage_num_hidden_layers_list),
            dtype=config.torch_dtype,
        )

    def launching(self, now: float) -> Snapshot:
        """A (re)start begins: what the last launch told is void."""
        return replace(
            self,
            phase="starting",
            launch=self.launch + 1,
            detail="",
            stages={},
            ready=None,
            began_at=now,
            ready_after_s=None,
        )

    def failed(self, reason: str) -> Snapshot:
        """The engine is not there; `reason` may have several lines."""
        return replace(self, phase="failed", detail=reason)

    def stopping(self) -> Snapshot:
        """The engine is being stopped because the user quits."""
        return replace(self, phase="stopping", detail="")

    def first_layer(self, rank: int) -> int:
        """The first decoder layer of a stage, counted from 0."""
        return sum(self.split[:rank])


def fold(snapshot: Snapshot, update: Update, now: float) -> Snapshot:
    """`snapshot` after an update from the client; the same object when nothing is new."""
    from engine.client import ClientState, Fetching, StateChanged
    from engine.protocol import EventEnvelope

    if snapshot.phase == "stopping":
        return snapshot
    match update:
        case Fetching(message=message):
            return replace(snapshot, detail=message)
        case StateChanged(state=ClientState.DEAD, reason=reason):
            return snapshot.failed(reason)
        case EventEnvelope(rank=rank, body=StageState() as state):
            return replace(snapshot, stages={**snapshot.stages, rank: state})
        case EventEnvelope(body=EngineReady() as ready):
            return _ready(snapshot, ready, now)
        case _:
            return snapshot


def _ready(snapshot: Snapshot, ready: EngineReady, now: float) -> Snapshot:
    return replace(
        snapshot,
        phase="ready",
        detail="",
        model=ready.model,
        split=tuple(ready.stages),
        dtype=ready.dtype,
        ready=ready,
        ready_after_s=None if snapshot.began_at is None else now - snapshot.began_at,
    )


def short_name(source: str) -> str:
    """A model's name for people, until the engine tells it: the last part of its source."""
    name = source.removeprefix("pypi:").partition("==")[0]
    return PurePath(name).name or source
