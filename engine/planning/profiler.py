"""Measures the live stages and the links between them, on request and while nothing else runs.

Rank 0 sends orders round the ring of stages, each of which does its part and passes them on:
every stage alone, one after the other; all at once, as they share cores; then each link by
messages to the next stage and short answers. What is timed is what answers requests: the stage's
own `run` and `judge`, and the link's own messages. A stage alone is timed as it is when its turn
comes: its weights are no longer in the processor's caches, its threads sleep.
"""

from __future__ import annotations

import platform
import queue
import statistics
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
import torch
from torch import Tensor

from engine.decoding.acceptance import CANDIDATES
from engine.decoding.tree import MAX_NODES, Tree, choose_tree
from engine.pipeline.batch import Entry, Judge
from engine.pipeline.link import Kind, Link
from engine.pipeline.memory import memory_bytes, memory_total_bytes, weights_bytes
from engine.planning.profiles import DeviceProfile, LinkProfile, Profile

if TYPE_CHECKING:
    from engine.pipeline.stage import Stage

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FAR = 1024
"""Tokens of the longer context; what lies between, or behind, is taken for linear."""
NODES = (1, 4, 16, 64)
SEQUENCES = (1, 4, 16)
BUDGET_S = 0.4
"""For each size; two times at least, whatever they take, and the first is no measurement."""
MOST = 7
COLD_BYTES = 64 << 20
"""Written before each time on a CPU: more than its caches hold."""
TOGETHER_S = 0.5
TOGETHER_ROWS = 64
SHARED_ROWS = 128
"""Of a chunk as long as most: it reads its weights while others are under way as well."""
PINGS = 20
BIG_PINGS = 3
BIG_ROWS = 256


class Op(IntEnum):
    """What an order is for; its numbers are the op, a hop, and bytes of JSON."""

    ALONE = 1
    TOGETHER = 2
    COLLECT = 3
    LINK = 4
    PING = 5
    ECHO = 6


class Profiler:
    """One rank's part in measuring."""

    def __init__(self, stage: Stage, link: Link | None, rank: int, world: int) -> None:
        self.stage, self.link, self.rank, self.world = stage, link, rank, world
        self._after = (rank + 1) % world
        self._together_ms = 0.0

    def handle(self, numbers: Sequence[int]) -> None:
        """Carry out an order, on every rank but the first, and pass it on."""
        op, hop, found = _decoded(numbers)
        if op is Op.PING:
            self._send(self.rank - 1, Op.ECHO)
            return
        if op is Op.TOGETHER:
            # First on its way: all are to be at it at once.
            self._send(self._after, op)
            self._together_ms = together_ms(self.stage, self.world)
            return
        if op is Op.ALONE:
            found.append(msgspec.to_builtins(measure_stage(self.stage, self.world)))
        elif op is Op.COLLECT:
            found.append(self._together_ms)
        elif hop == self.rank:
            found.append(msgspec.to_builtins(self._measure_link(self._receive_echo)))
        self._send(self._after, op, hop, found)

    def _receive_echo(self) -> None:
        assert self.link is not None
        self.link.receive(self._after)

    def _send(
        self, to: int, op: Op, hop: int = 0, found: Sequence[Any] = (), hidden: Tensor | None = None
    ) -> None:
        assert self.link is not None
        text = msgspec.json.encode(list(found))
        self.link.send(to, Kind.MEASURE, [op, hop, *text], hidden)

    def _measure_link(self, receive_echo: Callable[[], None]) -> LinkProfile:
        stage, link = self.stage, self.link
        assert link is not None
        hidden = torch.zeros(BIG_ROWS, link.hidden_size, dtype=stage.dtype, device=stage.device)

        def seconds(payload: Tensor | None) -> float:
            began = time.perf_counter()
            self._send(self._after, Op.PING, hidden=payload)
            receive_echo()
            return time.perf_counter() - began

        small = statistics.median(seconds(None) for _ in range(PINGS))
        big = statistics.median(seconds(hidden) for _ in range(BIG_PINGS))
        bits, transfer_s = 8 * BIG_ROWS * link.form.row_bytes, big - small
        return LinkProfile(
            latency_ms=1000.0 * small / 2,
            mbit_per_s=bits / transfer_s / 1e6 if transfer_s > 0 else None,
        )

    # --- rank 0 ----------------------------------------------------------------------------

    def run(
        self,
        inbox: queue.SimpleQueue[Any],
        returned: Callable[[Any], Sequence[int] | None],
        other: Callable[[Any], None],
    ) -> Profile:
        """Measure everything, on rank 0.

        Args:
            inbox: where messages of the last stage arrive, among other things.
            returned: the numbers of an order that came back; None for anything else.
            other: takes anything else.
        """
        first = measure_stage(self.stage, self.world)
        if self.link is None:
            return Profile(devices=(first,))
        last = self.world - 1

        def await_order() -> tuple[Op, list[Any]]:
            while True:
                item = inbox.get()
                if (numbers := returned(item)) is None:
                    other(item)
                    continue
                op, _, found = _decoded(numbers)
                if op is not Op.PING:
                    return op, found
                self._send(last, Op.ECHO)

        def order(op: Op, hop: int = 0) -> list[Any]:
            self._send(1, op, hop)
            return await_order()[1]

        alone = [first, *(msgspec.convert(each, DeviceProfile) for each in order(Op.ALONE))]
        self._send(1, Op.TOGETHER)
        times = [together_ms(self.stage, self.world)]
        await_order()
        times += order(Op.COLLECT)
        if self.world == 2:
            own = self._measure_link(lambda: void(await_order()))
        else:
            # The other thread receives from the last stage all the while, with buffers of its own.
            beside = self.link.beside()
            own = self._measure_link(lambda: void(beside.receive(1)))
        links = [own]
        for hop in range(1, self.world):
            links += (msgspec.convert(each, LinkProfile) for each in order(Op.LINK, hop))
        return Profile(devices=tuple(joined(alone, times)), links=tuple(links))


def void(_: object) -> None:
    """Nothing is made of it."""


def _decoded(numbers: Sequence[int]) -> tuple[Op, int, list[Any]]:
    return Op(numbers[0]), numbers[1], msgspec.json.decode(bytes(numbers[2:]), type=list[Any])


def joined(alone: Sequence[DeviceProfile], together_ms: Sequence[float]) -> list[DeviceProfile]:
    """The devices with their slowdowns; stages of one device are as fast as the fastest of them.

    together_ms: milliseconds of a run of TOGETHER_ROWS on each stage while all of them computed.
    """
    keys = [(device.host, device.name) for device in alone]
    ratios = [ms / _at_together(device) for ms, device in zip(together_ms, alone, strict=True)]
    found = []
    for device, key in zip(alone, keys, strict=True):
        same = [rank for rank, other in enumerate(keys) if other == key]
        tables = [alone[rank].layer_ms for rank in same]
        least = tuple(
            tuple(map(min, zip(*rows, strict=True))) for rows in zip(*tables, strict=True)
        )
        crowd = [rank for rank, other in enumerate(keys) if other[0] == key[0]]
        slowdown = statistics.fmean(ratios[rank] for rank in crowd) if len(crowd) > 1 else 1.0
        shared = statistics.fmean(alone[rank].share_slowdown for rank in same)
        shared = shared if len(crowd) > 1 else 1.0
        found.append(
            msgspec.structs.replace(
                device,
                layer_ms=least,
                slowdown=max(1.0, slowdown, shared),
                share_slowdown=shared,
            )
        )
    return found


def _at_together(device: DeviceProfile) -> float:
    return 1000.0 * device.layer_s(TOGETHER_ROWS, 0)


def together_ms(stage: Stage, world: int) -> float:
    """Milliseconds of a layer for TOGETHER_ROWS rows, over TOGETHER_S seconds without a pause.

    The first and the last part do not count: not all stages may be at it.
    """
    rows = min(TOGETHER_ROWS, _context(stage))
    stage.share(world)
    times: list[float] = []
    began = time.perf_counter()
    while (now := time.perf_counter()) - began < TOGETHER_S or not times:
        spent = run_s(stage, rows, 0)
        if 0.2 * TOGETHER_S < now - began < 0.7 * TOGETHER_S or not times:
            times.append(spent)
    stage.share(1)
    return 1000.0 * statistics.median(times[1:] or times) / len(stage.model.model.layers)


def measure_stage(stage: Stage, world: int) -> DeviceProfile:
    """A stage's device as it is now, and what its process takes."""
    stage.share(1)
    context = _context(stage)
    far = min(FAR, context // 2)
    rows = [n for n in ROWS if n <= context - far]
    layers = len(stage.model.model.layers)
    held = memory_bytes(stage.device)
    cool = cooler(stage.device)
    for start in range(0, far, rows[-1]):
        run_s(stage, rows[-1], start)  # rows of the context that are seen must be real
    cases = [partial(run_s, stage, n, at) for at in (0, far) for n in rows]
    times = _least_s(cases, cool)
    tables = [_rising(times[: len(rows)]), _rising(times[len(rows) :])]
    judging = _measure_judging(stage, cool) if stage.last else {}
    long = partial(run_s, stage, min(SHARED_ROWS, context), 0)

    def shared() -> float:
        stage.share(world)
        seconds = long()
        stage.share(1)
        return seconds

    whole_s, shared_s = _least_s([long, shared])
    return DeviceProfile(
        name=str(stage.device),
        host=f"{platform.node()}/{stage.device}",
        memory_bytes=_free_bytes(stage) + held,
        process_bytes=max(0, held - weights_bytes(stage)) if stage.device.type == "cpu" else 0,
        rows=tuple(rows),
        contexts=(0, far),
        layer_ms=tuple(tuple(1000.0 * s / layers for s in times) for times in tables),
        share_slowdown=max(1.0, shared_s / whole_s),
        **judging,
    )


def run_s(stage: Stage, rows: int, context: int) -> float:
    """Seconds of a run of `rows` tokens behind `context`."""
    tokens = [(7 * i) % stage.model.config.vocab_size for i in range(rows)]
    entry = Entry(0, context, tokens, list(range(-1, rows - 1)), Judge.NONE)
    hidden = None
    if not stage.first:
        generator = torch.Generator().manual_seed(rows)
        hidden = torch.randn(rows, stage.model.config.hidden_size, generator=generator)
        hidden = hidden.to(stage.device, stage.dtype)
    with stage.meter.muted():
        began = time.perf_counter()
        stage.run([entry], hidden)
        return time.perf_counter() - began


def cooler(device: torch.device) -> Callable[[], None]:
    """What leaves a stage as another one's turn does: caches full of other things."""
    if device.type != "cpu":
        return lambda: None
    other = torch.zeros(COLD_BYTES, dtype=torch.uint8)

    def cool() -> None:
        other.add_(1)

    return cool


def _measure_judging(stage: Stage, cool: Callable[[], None]) -> dict[str, Any]:
    heads = stage.model.heads.num_heads
    width = CANDIDATES if heads else 0
    # Sequential heads draft along a tree; one of the size that pays as a rule.
    hydra = stage.model.heads.kind == "hydra"
    along = choose_tree("mc_16", heads) if hydra else None

    def case(
        nodes: int, sequences: int = 1, *, width: int = width, heads: int = 0
    ) -> Callable[[], float]:
        entries = [_judged(nodes, width, heads, along) for _ in range(sequences)]
        hidden = torch.randn(nodes * sequences, stage.model.config.hidden_size)
        return partial(_judge_s, stage, entries, hidden.to(stage.device, stage.dtype))

    cases = [case(nodes) for nodes in NODES] + [case(1, count) for count in SEQUENCES]
    if heads:
        cases += [case(1, width=0), case(1, heads=1)]
    ms = [1000.0 * seconds for seconds in _least_s(cases, cool)]
    trees = len(NODES)
    found: dict[str, Any] = {
        "judge_nodes": NODES,
        "judge_ms": tuple(ms[:trees]),
        "judge_sequences": SEQUENCES,
        "judge_sequences_ms": tuple(ms[trees : trees + len(SEQUENCES)]),
    }
    if heads:
        found["undrafted_ms"], found["one_head_ms"] = ms[-2:]
    return found


def _judge_s(stage: Stage, entries: Sequence[Entry], hidden: Tensor) -> float:
    with stage.meter.muted():
        began = time.perf_counter()
        stage.judge(entries, hidden)
        return time.perf_counter() - began


def _judged(nodes: int, width: int, heads: int, along: Tree | None) -> Entry:
    return Entry(
        slot=0,
        start=0,
        tokens=[0] * nodes,
        parents=[-1, *[0] * (nodes - 1)],
        judge=Judge.TREE,
        draft_width=width,
        draft_heads=heads,
        draft_tree=along,
    )


def _least_s(
    cases: Sequence[Callable[[], float]], before: Callable[[], None] = lambda: None
) -> list[float]:
    """Of each case the least of some times, with `before` before each.

    Nothing but the work can make it longer; what does so in everyday use is in the figures of whole
    answers, see overhead.py. The cases take turns, so that no disturbance meets all times of one.
    """
    for case in cases:
        case()
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(MOST):
        for own, case in zip(times, cases, strict=True):
            if not own or sum(own) + own[-1] < BUDGET_S:
                before()
                own.append(case())
    return [min(own) for own in times]


def _rising(times: Sequence[float]) -> list[float]:
    """A larger step is no cheaper: one that seems to be tells that the smaller was held up."""
    return [*accumulate(reversed(times), min)][::-1]


def _context(stage: Stage) -> int:
    return stage.store.capacity - MAX_NODES


def _free_bytes(stage: Stage) -> int:
    """What others leave of the device's memory."""
    if stage.device.type == "cuda":
        return int(torch.cuda.mem_get_info(stage.device)[0])
    held = memory_bytes(stage.device)
    room = memory_total_bytes(stage.device) - held
    return max(0, min(int(psutil.virtual_memory().available), room))
