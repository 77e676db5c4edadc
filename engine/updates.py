"""What a client tells its listener, besides the workers' own events."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from engine.protocol import EventEnvelope


class ClientState(enum.Enum):
    """What the engine is doing."""

    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    """At least one request is open."""
    RECOVERING = "recovering"
    """A stage was lost and is being replaced; requests wait, and go on where they were."""
    DRAINING = "draining"
    """On its way to an end; no request is taken."""
    RESPAWNING = "respawning"
    """Starting again after an end."""
    DEAD = "dead"
    """No process is left."""


@dataclass(frozen=True)
class StateChanged:
    """The client is in another state; `reason` is for people and may be empty.

    For RECOVERING its first line tells which attempt it is, the rank, and what happened to it;
    below are the last lines of the rank's log.
    """

    state: ClientState
    reason: str


@dataclass(frozen=True)
class Fetching:
    """A line about a fetch of the model."""

    message: str


Update = EventEnvelope | StateChanged | Fetching
