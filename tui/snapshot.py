"""The engine as the screens see it: one frozen snapshot, and how an update changes it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal

from engine.config import JupiterConfig
from engine.protocol import EngineReady, StageState, TreeChosen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.client import Update

Phase = Literal["starting", "ready", "recovering", "applying", "stopping", "failed"]
"""While one config is being replaced by another the phase is "applying"."""


@dataclass(frozen=True)
class Snapshot:
    """What is known of the engine at one moment; times are seconds of a monotonic clock."""

    model: str
    split: tuple[int, ...]
    dtype: str
    phase: Phase = "starting"
    launch: int = 0
    """Counts the launches of this session, from 1; 0 before the first. A change is none."""
    detail: str = ""
    """What the start or the change is busy with, or why the engine failed."""
    stages: Mapping[int, StageState] = field(default_factory=dict)
    ready: EngineReady | None = None
    tree: TreeChosen | None = None
    """What the tuner of draft trees chose last; None where there is none."""
    began_at: float | None = None
    ready_after_s: float | None = None

    @classmethod
    def before_launch(cls, config: JupiterConfig) -> Snapshot:
        """What the configuration alone tells."""
        return cls(
            model=short_name(config.base_model_name_or_path),
            split=() if config.auto_split else tuple(config.stage_num_hidden_layers_list),
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
            tree=None,
            began_at=now,
            ready_after_s=None,
        )

    def applying(self, detail: str) -> Snapshot:
        """The engine is being changed; `detail` says how far that is."""
        return replace(self, phase="applying", detail=detail)

    def restarting(self, config: JupiterConfig, now: float) -> Snapshot:
        """A change comes to the point where an engine of `config` starts."""
        return replace(
            self.before_launch(config),
            phase="applying",
            detail=f"starting {list(config.stage_num_hidden_layers_list)}",
            launch=self.launch,
            began_at=now,
        )

    def settled(self, phase: Phase, detail: str = "") -> Snapshot:
        """A change has come to its end."""
        return replace(self, phase=phase, detail=detail)

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
    applying = snapshot.phase == "applying"
    match update:
        case Fetching(message=message):
            return replace(snapshot, detail=message)
        case StateChanged(state=ClientState.DEAD, reason=reason) if not applying:
            return snapshot.failed(reason)
        case StateChanged(state=ClientState.RECOVERING, reason=reason) if not applying:
            return replace(snapshot, phase="recovering", detail=reason)
        case EventEnvelope(rank=rank, body=StageState() as state):
            return replace(snapshot, stages={**snapshot.stages, rank: state})
        case EventEnvelope(body=EngineReady() as ready):
            return _ready(snapshot, ready, now)
        case EventEnvelope(body=TreeChosen() as tree):
            return replace(snapshot, tree=tree)
        case _:
            return snapshot


def _ready(snapshot: Snapshot, ready: EngineReady, now: float) -> Snapshot:
    applying = snapshot.phase == "applying"
    return replace(
        snapshot,
        # A change is not done before the new engine has shown that it works.
        phase="applying" if applying else "ready",
        detail=snapshot.detail if applying else "",
        model=ready.model,
        split=tuple(ready.stages),
        dtype=ready.dtype,
        ready=ready,
        tree=None,
        ready_after_s=None if snapshot.began_at is None else now - snapshot.began_at,
    )


def short_name(source: str) -> str:
    """A model's name for people, until the engine tells it: the last part of its source."""
    name = source.removeprefix("pypi:").partition("==")[0]
    return PurePath(name).name or source
