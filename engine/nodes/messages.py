"""What the first machine and the others tell each other, over CURVE.

Every message is one msgpack frame of a tagged struct, as on the shared queue, whose own frames
travel in `Queued` unchanged.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import msgspec

from engine.errors import harmless
from engine.nodes.weights import Artifact
from engine.protocol import decoded

VERSION = 1
BEAT_S = 0.25
"""Seconds between two messages of a side that has nothing else to say."""
LOST_S = 2.0
"""After so many seconds of silence the other side is gone."""
MAX_BYTES = 1 << 26
SHOWN = 4000
"""Characters of a text of the other side that are shown."""


class Queued(msgspec.Struct, frozen=True, tag=True):
    """A frame of the shared queue: a command to the workers, an event from one."""

    frame: bytes


class Beat(msgspec.Struct, frozen=True, tag=True):
    """Still here."""


# --- the first machine -> another ----------------------------------------------------------------


class Seat(msgspec.Struct, frozen=True, tag=True):
    """You are in: node `number` of `of`, the first machine being node 0."""

    number: int
    of: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """You are not."""

    reason: str
    passing: bool
    """It may be another in a moment."""


class Rejoin(msgspec.Struct, frozen=True, tag=True):
    """You were silent for too long and have lost your seat: end all, and join again."""


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """Have these at hand, and say `Prepared`, or `Failed`."""

    number: int
    model: Artifact
    heads: Artifact | None


class Part(msgspec.Struct, frozen=True, tag=True):
    """The part of a file that was wanted."""

    data: bytes


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Start workers for `ranks` ranks from `first_rank` on, in the place of those there are."""

    epoch: int
    first_rank: int
    ranks: int
    workers: tuple[int, ...]
    config: dict[str, object]


class Change(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What workers that start from now on are told; see engine/run_dir.py."""

    epoch: int
    workers: tuple[int, ...]
    config: dict[str, object]


class Kill(msgspec.Struct, frozen=True, tag=True):
    """End one worker."""

    pid: int


class End(msgspec.Struct, frozen=True, tag=True):
    """End all workers."""


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The run is over."""


class Answered(msgspec.Struct, frozen=True, tag=True):
    """To an `Asked`."""

    asker: bytes
    frame: bytes


ToNode = (
    Queued
    | Beat
    | Seat
    | Refused
    | Rejoin
    | Prepare
    | Part
    | Begin
    | Change
    | Kill
    | End
    | Goodbye
    | Answered
)


# --- another machine -> the first ----------------------------------------------------------------


class Join(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Asks for a seat."""

    version: int
    release: str
    """Of the package: stages of two releases may not understand each other."""
    name: str
    """The machine's, for people."""
    instance: str
    """Another one for every `jupiter join`."""


class Wanted(msgspec.Struct, frozen=True, tag=True):
    """Send a part of an artifact's file."""

    heads: bool
    file: int
    offset: int


class Doing(msgspec.Struct, frozen=True, tag=True):
    """How far a preparation is, for people."""

    text: str


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """All that `Prepare` named is here."""

    number: int
    """Its own, so that an answer to an earlier one is no answer to this."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """`Prepare` or `Begin` cannot be done, in one line; or the workers' launcher has ended."""

    message: str
    leaves: bool
    """The machine has been of no use yet, and gives its seat back."""


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A worker has ended."""

    pid: int


class Exit(msgspec.Struct, frozen=True, tag=True):
    """How one ended; see `engine.logs.note_exit`."""

    epoch: int
    rank: int
    pid: int
    code: int


class Logged(msgspec.Struct, frozen=True, tag=True):
    """What a rank has written to its log."""

    rank: int
    data: bytes


class Asked(msgspec.Struct, frozen=True, tag=True):
    """A request to the exchange; see engine/nodes/exchange.py."""

    asker: bytes
    frame: bytes


class Leave(msgspec.Struct, frozen=True, tag=True):
    """This machine has been stopped."""


ToFirst = (
    Queued
    | Beat
    | Join
    | Wanted
    | Doing
    | Prepared
    | Failed
    | Ended
    | Exit
    | Logged
    | Asked
    | Leave
)

_encoder = msgspec.msgpack.Encoder()
_to_node = msgspec.msgpack.Decoder(ToNode)
_to_first = msgspec.msgpack.Decoder(ToFirst)


def encode(message: ToNode | ToFirst) -> bytes:
    """The frame of a message."""
    return _encoder.encode(message)


def decode_to_node(frame: bytes) -> ToNode | None:
    """The message in `frame`, None when it is malformed."""
    return decoded(_to_node, frame)


def decode_to_first(frame: bytes) -> ToFirst | None:
    """The message in `frame`, None when it is malformed."""
    return decoded(_to_first, frame)


def printable(text: str) -> str:
    """What the other side says, as it may be shown: no control character but new lines."""
    return harmless(text[:SHOWN], kept="\n")


def release() -> str:
    """Of this package; "" where it is not installed."""
    try:
        return version("jupiter-workbench")
    except PackageNotFoundError:
        return ""
