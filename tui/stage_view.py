"""What the stage editor shows, as plain values: cards per stage, and draft against live. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engine.planning.memory import ModelSizes, StageSize
from engine.planning.prediction import Measured, Timing, place, predict
from engine.protocol import StageTelemetry
from tui.metrics import UNKNOWN
from tui.speeds import LiveFigures
from tui.stage_draft import StageDraft

Tone = Literal["", "better", "worse", "warning", "error"]
WARNING_SHARE, ERROR_SHARE = 0.75, 0.90
"""Of a device's memory: from these shares on, what is needed is shown in another colour."""
ABOUT = "≈"
GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Figure:
    """A line of a card: what it is, its value, and how it differs from live."""

    label: str
    value: str
    change: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Card:
    """One stage of the draft."""

    rank: int
    device: str
    first_layer: int
    num_layers: int
    change: int
    """Layers more than this rank has live; a rank that is not live has none."""
    is_new: bool
    holds: tuple[str, ...]
    figures: tuple[Figure, ...]
    share: float | None
    """Of its device's memory, together with all other stages there."""
    room: str
    """What `share` is measured against."""


@dataclass(frozen=True)
class Compared:
    """A line of the comparison."""

    label: str
    live: str
    draft: str
    change: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class StageFacts:
    """All that is known when the editor is drawn; `sizes` is None until the files were read."""

    draft: StageDraft
    sizes: ModelSizes | None
    live: LiveFigures
    measured: Measured
    num_sub_sequences: int
    max_sub_sequence_len: int

    def predict(self, split: Sequence[int]) -> Timing:
        """The times of a split."""
        return predict(
            split,
            self.measured,
            num_sub_sequences=self.num_sub_sequences,
            max_sub_sequence_len=self.max_sub_sequence_len,
        )

    @property
    def sequences(self) -> int:
        """How many sequences the live engine has made KV caches for; 1 before it is known."""
        if self.sizes is None:
            return 1
        made = [
            telemetry.kv_bytes // size.kv_per_sequence
            for telemetry, size in zip(
                self.live.telemetry.values(), self.sizes.stages(self.draft.live), strict=False
            )
        ]
        return max(made, default=1) or 1

    def devices(self, split: Sequence[int]) -> list[str | None]:
        """Where each stage runs; None for a new one that could be anywhere."""
        known = self.live.telemetry
        if set(known) == set(range(len(self.draft.live))):
            names = [telemetry.device for telemetry in known.values()]
            new = names[0] if len(set(names)) == 1 else None
            return [names[r] if r < len(names) else new for r in range(len(split))]
        return place(len(split), self.measured.stages)

    def memory_total(self, device: str | None) -> int | None:
        """Bytes that a device has; None where no live stage told."""
        totals = [t.memory_total_bytes for t in self.live.telemetry.values() if t.device == device]
        return totals[0] if totals else None

    def needed(self, split: Sequence[int]) -> dict[str | None, int]:
        """Bytes that the stages of a split need on each device."""
        needed: dict[str | None, int] = {}
        if self.sizes is not None:
            for device, size in zip(self.devices(split), self.sizes.stages(split), strict=True):
                needed[device] = needed.get(device, 0) + size.total(self.sequences)
        return needed


def cards(facts: StageFacts) -> list[Card]:
    """The stages of the draft, first to last."""
    draft, sizes = facts.draft, facts.sizes
    drafted = sizes.stages(draft.split) if sizes else [None] * len(draft.split)
    live = sizes.stages(draft.live) if sizes else [None] * len(draft.live)
    devices, needed = facts.devices(draft.split), facts.needed(draft.split)
    steps = facts.predict(draft.split).steps
    found = []
    for rank, count in enumerate(draft.split):
        old = live[rank] if rank < len(live) else None
        telemetry = facts.live.telemetry.get(rank)
        device = devices[rank]
        total = facts.memory_total(device)
        figures = [*_memory(drafted[rank], old, facts.sequences)]
        figures += _memory_now(telemetry, facts.live)
        figures.append(_step(facts, rank, steps[rank]))
        found.append(
            Card(
                rank=rank,
                device=device or "",
                first_layer=sum(draft.split[:rank]),
                num_layers=count,
                change=count - (draft.live[rank] if rank < len(draft.live) else 0),
                is_new=rank >= len(draft.live),
                holds=_holds(drafted[rank], rank, len(draft.split)),
                figures=tuple(figures),
                share=needed[device] / total if total and device in needed else None,
                room=f"of {size(total)}" if total else f"of {UNKNOWN}",
            )
        )
    return found


def _holds(stage: StageSize | None, rank: int, world: int) -> tuple[str, ...]:
    if stage is not None:
        return stage.holds
    return (("embedding",) if rank == 0 else ()) + (
        ("norm", "lm_head") if rank == world - 1 else ()
    )


def _memory(stage: StageSize | None, old: StageSize | None, sequences: int) -> list[Figure]:
    labels = ("weights", "KV cache", "activations", "together")
    if stage is None:
        return [Figure(label, UNKNOWN) for label in labels]

    def parts(of: StageSize) -> tuple[int, ...]:
        return of.weights, of.kv(sequences), of.activations, of.total(sequences)

    before: Sequence[int | None] = parts(old) if old else [None] * len(labels)
    about = ("", "", ABOUT, ABOUT)
    return [
        Figure(label, sign + size(new), *_size_change(new, was))
        for label, new, was, sign in zip(labels, parts(stage), before, about, strict=True)
    ]


def _memory_now(telemetry: StageTelemetry | None, live: LiveFigures) -> list[Figure]:
    """As measured; a new stage has none yet, and is told so where the others have some."""
    if telemetry is not None:
        return [Figure(f"{telemetry.memory_kind} now", size(telemetry.memory_bytes))]
    kinds = [other.memory_kind for other in live.telemetry.values()]
    return [Figure(f"{kind} now", UNKNOWN) for kind in kinds[:1]]


def _step(facts: StageFacts, rank: int, predicted: float | None) -> Figure:
    """A decode step's computing: measured where the draft is the live split, else predicted."""
    live = facts.live.step_s.get(rank)
    if live is not None and not facts.draft.changed:
        return Figure("ms per step", ms(live))
    value = UNKNOWN if predicted is None else ABOUT + ms(predicted)
    return Figure("ms per step", value, *_change(predicted, live, 1000, 1))


def comparison(facts: StageFacts) -> list[Compared]:
    """Draft against live: memory per device, time to first token, time per token."""
    draft, live = facts.draft, facts.live
    predicted = facts.predict(draft.split)
    ttft_s = _in_proportion(predicted.ttft_s, facts.predict(draft.live).ttft_s, live.ttft_s)
    token_s = _in_proportion(predicted.token_s, facts.predict(draft.live).token_s, live.token_s)
    lines = [*_compare_memory(facts)]
    rows = live.prompt_rows or facts.measured.prompt_rows
    ttft = "first token" + (f", {rows} new tokens" if rows else "")
    lines.append(_compare_time(ttft, live.ttft_s, ttft_s, 0))
    lines.append(_compare_time("per token", live.token_s, token_s, 1))
    return lines


def _in_proportion(
    drafted: float | None, predicted: float | None, measured: float | None
) -> float | None:
    """A draft's time, corrected by how the live one was measured against its own prediction."""
    if drafted is None or not predicted or measured is None:
        return drafted
    return drafted * measured / predicted


def _compare_time(label: str, live: float | None, drafted: float | None, digits: int) -> Compared:
    about = UNKNOWN if drafted is None else f"{ABOUT}{ms(drafted)} ms"
    change = _change(drafted, live, 1000, digits, " ms")
    return Compared(label, ms_or_unknown(live), about, *change)


def _compare_memory(facts: StageFacts) -> list[Compared]:
    draft = facts.draft
    if facts.sizes is None:
        return [Compared("memory", UNKNOWN, UNKNOWN)]
    now, then = facts.needed(draft.live), facts.needed(draft.split)
    lines = []
    for device in sorted({*now, *then}, key=str):
        total = facts.memory_total(device)
        new, old = then.get(device, 0), now.get(device, 0)
        change, tone = _size_change(new, old)
        where = "memory" if device is None else f"memory on {device}"
        if total:
            where += f", of {size(total)}"
            # Whether it fits is more than whether it grows.
            tone = share_tone(new / total) or tone
            change += " does not fit" if new > total else ""
        lines.append(Compared(where, ABOUT + size(old), ABOUT + size(new), change, tone))
    return lines


def share_tone(share: float) -> Tone:
    """The colour of a share of a device's memory."""
    return "error" if share >= ERROR_SHARE else "warning" if share >= WARNING_SHARE else ""


def size(value: int) -> str:
    """Bytes for people: `12.3 GiB`, `0.234 GiB`, `9.1 MiB`."""
    if value < GIB / 100:
        return f"{value / MIB:.1f} MiB" if value >= MIB / 10 else f"{value / 1024:.1f} KiB"
    gib = value / GIB
    return (
        f"{gib:.3f} GiB" if gib < 0.9995 else f"{gib:.2f} GiB" if gib < 9.995 else f"{gib:.1f} GiB"
    )


def ms(seconds: float | None) -> str:
    """Milliseconds without their unit: `0.42`, `8.3`, `412`."""
    if seconds is None:
        return UNKNOWN
    value = seconds * 1000
    return f"{value:.2f}" if value < 0.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def ms_or_unknown(seconds: float | None) -> str:
    """Milliseconds with their unit, or "n/a"."""
    return UNKNOWN if seconds is None else f"{ms(seconds)} ms"


def _size_change(new: int, old: int | None) -> tuple[str, Tone]:
    if old is None or new == old:
        return "", ""
    sign, tone = ("+", "worse") if new > old else ("−", "better")
    return sign + size(abs(new - old)), tone  # type: ignore[return-value]


def _change(
    new: float | None, old: float | None, scale: float, digits: int, unit: str = ""
) -> tuple[str, Tone]:
    """The difference for people; none where one of both is unknown or it would read as 0."""
    if new is None or old is None:
        return "", ""
    difference = round((new - old) * scale, digits)
    if not difference:
        return "", ""
    sign, tone = ("+", "worse") if difference > 0 else ("−", "better")
    return f"{sign}{abs(difference):.{digits}f}{unit}", tone  # type: ignore[return-value]
