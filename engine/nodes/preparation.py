"""What a machine does until it has the model and the heads: look, compare, receive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from engine.errors import CheckpointError
from engine.nodes.messages import Prepare, Wanted
from engine.nodes.weights import Artifact, Receiver, own_copy, received, verified

STEPS = 10
"""Progress is told so often."""


class Preparation:
    """One `Prepare`.

    Args:
        prepare: what is asked for.
        receive: have all sent, whatever this machine has of its own.
        wake: called from a thread when `looked` may say something new.
    """

    def __init__(self, prepare: Prepare, *, receive: bool, wake: Callable[[], None]) -> None:
        self.number = prepare.number
        self._artifacts = [prepare.model, *([prepare.heads] if prepare.heads else [])]
        self._receive = receive
        self._wake = wake
        self._found: list[Path | None] = []
        self._error: CheckpointError | None = None
        self._receiver: Receiver | None = None
        self._told = -1
        # Hashing takes a second for each few hundred megabytes.
        self._thread = threading.Thread(target=self._look, name="jupiter-hashes", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        try:
            find = verified if self._receive else own_copy
            self._found = [find(artifact) for artifact in self._artifacts]
        except CheckpointError as error:
            self._error = error
        self._wake()

    @property
    def looked(self) -> bool:
        """Whether it is known what is here."""
        return not self._thread.is_alive()

    def next(self) -> Wanted | None:
        """The part to ask for now, once `looked`; None when nothing is missing any more.

        Raises CheckpointError: a copy has something else in it, or what comes cannot be kept.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        if None not in self._found:
            return None
        index = self._found.index(None)
        if self._receiver is None:
            self._receiver, self._told = Receiver(self._artifacts[index]), -1
        if self._receiver.wanted is None:
            self._found[index] = received(self._artifacts[index])
            self._receiver = None
            return self.next()
        file, offset = self._receiver.wanted
        return Wanted(index == 1, file, offset)

    def take(self, data: bytes) -> None:
        """Take the part that was asked for; raises CheckpointError as `next`."""
        if self._receiver is not None:
            self._receiver.take(data)

    def progress(self) -> str:
        """How far it is, for people; "" when nothing new can be said."""
        if self._receiver is None:
            return ""
        artifact = self._artifacts[self._found.index(None)]
        step = STEPS * self._receiver.received // max(1, artifact.size)
        if step == self._told:
            return ""
        self._told = step
        return (
            f"receiving {_name(artifact)}: {100 // STEPS * step} % of {artifact.size / 1e6:.0f} MB"
        )

    def paths(self) -> tuple[Path, Path | None]:
        """Model folder and heads, once `next` has given None."""
        model, *heads = (path for path in self._found if path is not None)
        return model, heads[0] if heads else None

    def close(self) -> None:
        """Remove what is half received."""
        if self._receiver is not None:
            self._receiver.close()


def _name(artifact: Artifact) -> str:
    return artifact.source.rstrip("/").rpartition("/")[2]
