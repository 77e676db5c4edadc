"""What a planner knows of devices and links: measured, or written by hand as JSON. Pure.

The file's schema is in docs/planner.md. Times are milliseconds, as people write them.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from engine.errors import ConfigError

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]
Place = Annotated[int, Meta(ge=0)]


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage's device, as fast as it is while no other stage computes."""

    name: str
    host: str = ""
    """Stages of one host share its cores or its GPU; "" is a machine of its own."""
    memory_bytes: Count | None = None
    """What weights, KV caches and activations of the host's stages may take; None for no limit."""
    process_bytes: Place = 0
    """Of it, what a stage's process takes besides weights and caches."""
    rows: Annotated[tuple[Count, ...], Meta(min_length=1)]
    """Row counts that were measured, ascending."""
    contexts: Annotated[tuple[Place, ...], Meta(min_length=1)] = (0,)
    """Tokens before these rows, ascending."""
    layer_ms: Annotated[tuple[tuple[Positive, ...], ...], Meta(min_length=1)]
    """One decoder layer: a list for each of `contexts`, in it a number for each of `rows`."""
    stage_ms: NotNegative = 0.0
    """Every micro-batch besides, however many layers the stage has."""
    judge_nodes: Annotated[tuple[Count, ...], Meta(min_length=1)] = (1,)
    judge_ms: Annotated[tuple[NotNegative, ...], Meta(min_length=1)] | None = None
    """`lm_head`, acceptance and drafting by all heads, for one sequence with a tree of so many
    nodes; a number for each of `judge_nodes`. Only of a last stage."""
    undrafted_ms: NotNegative | None = None
    """The same for one node without drafting."""
    one_head_ms: NotNegative | None = None
    """The same for one node, drafting by one head."""
    judge_sequences: Annotated[tuple[Count, ...], Meta(min_length=1)] = (1,)
    judge_sequences_ms: Annotated[tuple[NotNegative, ...], Meta(min_length=1)] | None = None
    """The same for so many sequences of one node each, drafting by all heads."""
    slowdown: Annotated[float, Meta(ge=1)] = 1.0
    """How many times longer it takes while all stages of its host compute."""
    share_slowdown: Annotated[float, Meta(ge=1)] = 1.0
    """Of it, so many times because it leaves cores to the others while several micro-batches are
    under way, be they computing or not; `slowdown` at most."""

    def layer_s(self, rows: int, context: int) -> float:
        """Seconds of one layer for `rows` behind `context` tokens, between measured points."""
        at = [between(self.rows, times, rows) for times in self.layer_ms]
        return between(self.contexts, at, context) / 1000.0

    def judge_s(self, nodes: int = 1, *, sequences: int = 1, drafting: float = 1.0) -> float:
        """Seconds of judging trees and drafting; 0 where it was not measured.

        nodes: of each sequence's tree; drafting: as a part of that by all heads, see `drafting`.
        """
        if self.judge_ms is None:
            return 0.0
        plain = self.judge_ms[0]
        ms = plain + (between(self.judge_nodes, self.judge_ms, nodes) - plain) * sequences
        if self.judge_sequences_ms is not None:
            ms += between(self.judge_sequences, self.judge_sequences_ms, sequences)
            ms -= self.judge_sequences_ms[0]
        ms -= (1.0 - drafting) * (
            plain - (plain if self.undrafted_ms is None else self.undrafted_ms)
        )
        return max(0.0, ms) / 1000.0

    def drafting(self, depth: int, num_heads: int) -> float:
        """What drafting by the first `depth` heads takes, as a part of that by all."""
        if depth in (0, num_heads):
            return float(depth > 0)
        first = 1.0 / num_heads
        if self.judge_ms and None not in (self.one_head_ms, self.undrafted_ms):
            undrafted = self.undrafted_ms or 0.0
            whole = self.judge_ms[0] - undrafted
            first = (
                min(1.0, ((self.one_head_ms or 0.0) - undrafted) / whole) if whole > 0 else first
            )
        return first + (1.0 - first) * (depth - 1) / (num_heads - 1)


class LinkProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The way from one stage to the next."""

    latency_ms: NotNegative
    """Of a small message, with the receiver's waking up."""
    mbit_per_s: Positive | None = None
    """Million bits per second; None where messages are too small to tell."""
    busy_ms: NotNegative = 0.0
    """What it takes more to receive one while the sender computes the next: its threads have to
    wait for a core."""

    def transfer_s(self, size: int) -> float:
        """Seconds that `size` bytes keep the link, latency aside."""
        return 0.0 if self.mbit_per_s is None else size * 8 / (self.mbit_per_s * 1e6)


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Devices in the order of their stages, and the links between them."""

    version: Literal[1] = 1
    devices: Annotated[tuple[DeviceProfile, ...], Meta(min_length=1)]
    links: tuple[LinkProfile, ...] = ()
    """Behind each stage: to the next one, and from the last back to the first."""
    about: dict[str, str] = {}
    """Where the figures come from: model, dtype and the like, for people."""

    @property
    def hosts(self) -> list[str]:
        """The host of each stage; a machine of its own has its rank as its name."""
        return [device.host or f"#{rank}" for rank, device in enumerate(self.devices)]


def between(places: Sequence[int], values: Sequence[float], at: int) -> float:
    """Linear between measured points, level before the first, rising on behind the last."""
    if at <= places[0] or len(places) == 1:
        return values[0]
    i = min(bisect_left(places, at), len(places) - 1)
    left, right = places[i - 1], places[i]
    slope = (values[i] - values[i - 1]) / (right - left)
    if at <= right:
        return values[i - 1] + slope * (at - left)
    return values[i] + max(0.0, slope) * (at - right)


def read_profile(path: str | Path) -> Profile:
    """The profile in a JSON file.

    Raises ConfigError in one line that names the file, the place in it, and what would be right.
    """
    try:
        text = Path(path).expanduser().read_bytes()
        profile = msgspec.json.decode(text, type=Profile)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_place(str(error))}; see docs/planner.md") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if problem := _problem(profile):
        raise ConfigError(f"{path}: {problem}; see docs/planner.md")
    return profile


def write_profile(path: Path, profile: Profile) -> None:
    """Write the file in one go; raises ConfigError naming it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None


def _place(message: str) -> str:
    """msgspec's message with the place first: `devices[1].rows: expected ...`."""
    found = re.fullmatch(r"(.*) - at `\$\.?(.*)`", message)
    return f"{found[2]}: {found[1]}" if found else message


def _problem(profile: Profile) -> str:
    """What the types alone do not tell; "" where all is well."""
    world = len(profile.devices)
    if len(profile.links) != (world if world > 1 else 0):
        wanted = f"one for each of {world} devices" if world > 1 else "none for one device"
        return f"links: there are {len(profile.links)}, there must be {wanted}"
    for rank, device in enumerate(profile.devices):
        where = f"devices[{rank}]"
        for key in ("rows", "contexts", "judge_nodes", "judge_sequences"):
            values: tuple[int, ...] = getattr(device, key)
            if any(a >= b for a, b in pairwise(values)):
                return f"{where}.{key}: {list(values)} must ascend"
        if len(device.layer_ms) != len(device.contexts):
            return f"{where}.layer_ms: needs a list for each of {len(device.contexts)} contexts"
        if any(len(times) != len(device.rows) for times in device.layer_ms):
            return f"{where}.layer_ms: each list needs {len(device.rows)} numbers, one for each row"
        if device.share_slowdown > device.slowdown:
            return f"{where}.share_slowdown: {device.share_slowdown} is more than slowdown"
        for key, times in (
            ("judge_nodes", device.judge_ms),
            ("judge_sequences", device.judge_sequences_ms),
        ):
            if times is not None and len(times) != len(getattr(device, key)):
                return f"{where}: judge times need a number for each of {key}"
    return ""
