"""The best split and the best chunks, by dynamic programming. Pure functions over `Costs`.

Both searches keep, for every place they can be at, the ways there that no other one beats in every
respect (labels): more time or more memory is never of use later on, so nothing better is lost.

A prompt's time is that of its chunks through the stages, each stage taking one at a time, and no
less than what a host's stages together have to compute, at the pace that they share its cores
with. Where every stage has a host of its own that is what `simulate` says of any number of flights;
where they share one it is never more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from engine.errors import ConfigError
from engine.planning.costs import Costs
from engine.planning.simulator import Hop

Label = tuple[float, ...]
EXHAUSTIVE = 100
"""Up to so many splits each gets the best chunks of its own; beyond, both are improved in turn."""
ROUNDS = 8
SAME = 1e-6
"""Times that differ by less are the same: sums in another order."""


@dataclass(frozen=True)
class Found:
    """A split with chunks, and the seconds that it was chosen for."""

    split: tuple[int, ...]
    chunks: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Hosts:
    """The stages' hosts as numbers: what labels carry along for each of them."""

    of: tuple[int, ...]
    """Of each stage."""
    capacity: tuple[float, ...]
    """Stages' work that a host does at a time: 1 where they slow each other by their number."""
    limit: tuple[float, ...]
    """Bytes; infinite without a limit."""

    @classmethod
    def of_costs(cls, costs: Costs) -> Hosts:
        """From a profile."""
        sharing, limits = costs.sharing, costs.limits()
        names = list(dict.fromkeys(sharing.hosts))
        capacity = []
        for name in names:
            own = [r for r in range(costs.stages) if sharing.hosts[r] == name]
            # With unlike slowdowns the host does at most what its least slowed stages would.
            capacity.append(len(own) / min(sharing.slowdown[r] for r in own))
        return cls(
            tuple(names.index(host) for host in sharing.hosts),
            tuple(max(1.0, each) for each in capacity),
            tuple(float(limits.get(str(name), math.inf)) for name in names),
        )

    def spend(self, spent: list[float], rank: int, seconds: float) -> None:
        """Add a stage's work to its host's; alone on it, the stage's own times tell enough."""
        if self.of.count(self.of[rank]) > 1:
            spent[self.of[rank]] += seconds

    def busiest_s(self, work: Sequence[float]) -> float:
        """Seconds that the host with the most work takes for it."""
        return max(w / c for w, c in zip(work, self.capacity, strict=True))


def best_split(
    costs: Costs,
    work: Callable[[int, int], Sequence[float]],
    hops: Sequence[Sequence[Hop]],
    *,
    steady: bool = False,
    tolerance: float = SAME,
) -> tuple[float, tuple[int, ...]]:
    """The split of the least time for given micro-batches.

    Of those that are as good, but for a share of `tolerance`, the one whose slowest stage is
    fastest: where it makes no difference, stages are alike.

    Args:
        costs: for the number of layers and stages, and their memory.
        work: of stage and layers: seconds of each micro-batch there.
        hops: of each micro-batch, [batch][stage].
        steady: micro-batches come without end: what counts is the slowest stage, link or host.

    Returns its seconds and the layers per stage. Raises ConfigError where none fits into memory.
    """
    hosts, batches = Hosts.of_costs(costs), len(hops)
    n_hosts = len(hosts.capacity)
    at_work, at_memory = batches + 1, batches + 1 + n_hosts

    def extend(label: Label, rank: int, layers: int) -> Label | None:
        host = hosts.of[rank]
        needed = label[at_memory + host] + costs.memory(rank, layers)
        if needed > hosts.limit[host]:
            return None
        seconds = work(rank, layers)
        behind = [hop[rank] for hop in hops]
        if steady:
            longest = max(*seconds, *(hop.transfer_s for hop in behind))
            times = [max(label[0], longest)] * batches
        else:
            times = _through_stage(label[:batches], seconds, behind)
        slowest = max(label[batches], sum(seconds))
        spent = list(label[at_work:at_memory])
        hosts.spend(spent, rank, sum(seconds))
        memory = list(label[at_memory:])
        memory[host] = needed if hosts.limit[host] < math.inf else 0.0
        return (*times, slowest, *spent, *memory)

    def value(label: Label) -> float:
        return max(label[batches - 1], hosts.busiest_s(label[at_work:at_memory]))

    start: dict[int, dict[Label, tuple[int, ...]]] = {0: {(0.0,) * (at_memory + n_hosts): ()}}
    for rank in range(costs.stages):
        behind = costs.stages - rank - 1
        reached: dict[int, dict[Label, tuple[int, ...]]] = {}
        for used, labels in start.items():
            left = costs.num_layers - used
            for layers in [left] if not behind else range(1, left - behind + 1):
                for label, split in labels.items():
                    if (longer := extend(label, rank, layers)) is not None:
                        reached.setdefault(used + layers, {})[longer] = (*split, layers)
        start = {used: _unbeaten(labels) for used, labels in reached.items()}
    found = start.get(costs.num_layers)
    if not found:
        raise ConfigError(_no_room(costs))
    good = (1.0 + tolerance) * min(value(label) for label in found)
    alike = [(label[batches], split) for label, split in found.items() if value(label) <= good]
    split = min(alike)[1]
    return min(value(label) for label in found if found[label] == split), split


def _through_stage(
    arrivals: Sequence[float], seconds: Sequence[float], hops: Sequence[Hop]
) -> list[float]:
    """When each micro-batch is at the next stage."""
    free = link = 0.0
    out = []
    for at, work, hop in zip(arrivals, seconds, hops, strict=True):
        free = max(at, free) + work
        link = max(free, link) + hop.transfer_s
        out.append(link + hop.latency_s)
    return out


def _unbeaten(labels: dict[Label, tuple[int, ...]]) -> dict[Label, tuple[int, ...]]:
    """The labels that no other one is as good as in every place."""
    kept: list[Label] = []
    for label in sorted(labels, key=lambda each: (each, labels[each])):
        if not any(all(a <= b for a, b in zip(other, label, strict=True)) for other in kept):
            kept.append(label)
    return {label: labels[label] for label in kept}


def best_chunks(
    costs: Costs,
    split: Sequence[int],
    rows: int,
    *,
    start: int = 0,
    unit: int = 32,
    longest: int | None = None,
    better_than: float = math.inf,
) -> tuple[float, tuple[int, ...]] | None:
    """The chunks of a prompt of `rows` behind `start` cached tokens, for a given split.

    Args:
        unit: chunks are multiples of it, but the longest and the last.
        longest: rows of the longest chunk.
        better_than: seconds; ways that cannot be better are left out.

    Returns seconds to the first token and the chunks; None where nothing is better.
    """
    hosts, stages = Hosts.of_costs(costs), len(split)
    longest = max(unit, min(longest or rows, rows))
    sizes = [*range(unit, longest, unit), longest]
    at_work, n_hosts = 2 * stages, len(hosts.capacity)
    way_back = costs.hop(stages - 1, 0)

    def extend(label: Label, done: int, size: int) -> Label:
        """Times at which each stage and each link is free, and the work of shared hosts."""
        free, link = list(label[:stages]), list(label[stages:at_work])
        spent, at = list(label[at_work:]), 0.0
        for rank, layers in enumerate(split):
            crowded = size < rows  # other chunks are under way
            seconds = costs.stage_s(rank, layers, size, start + done, crowded=crowded)
            if rank == stages - 1 and done + size == rows:
                seconds += costs.judge_s() * (costs.crowd(rank) if crowded else 1.0)
            hop = costs.hop(rank, size)
            free[rank] = max(at, free[rank]) + seconds
            link[rank] = max(free[rank], link[rank]) + hop.transfer_s
            at = link[rank] + hop.latency_s
            hosts.spend(spent, rank, seconds)
        return (*free, *link, *spent)

    def value(label: Label) -> float:
        return max(label[at_work - 1] + way_back.latency_s, hosts.busiest_s(label[at_work:]))

    places: dict[int, dict[Label, tuple[int, ...]]] = {0: {(0.0,) * (at_work + n_hosts): ()}}
    for done in range(0, rows, unit):
        for label, chunks in _unbeaten(places.pop(done, {})).items():
            for size in {min(size, rows - done) for size in sizes}:
                longer = extend(label, done, size)
                if value(longer) < better_than:
                    places.setdefault(done + size, {})[longer] = (*chunks, size)
    found = places.get(rows)
    if not found:
        return None
    label, chunks = min(found.items(), key=lambda item: (value(item[0]), item[1]))
    return value(label), chunks


def best_prefill(
    costs: Costs,
    rows: int,
    *,
    start: int = 0,
    unit: int = 32,
    longest: int | None = None,
    exhaustive: int = EXHAUSTIVE,
) -> Found:
    """Split and chunks with the least time to the first token of a prompt of `rows`.

    Exact where there are at most `exhaustive` splits. Beyond, the best split of given chunks and
    the best chunks of a given split take turns, from chunks of each size, until neither improves.

    Raises ConfigError where no split fits into memory.
    """

    def chunks_of(split: Sequence[int], better_than: float = math.inf) -> Found | None:
        found = best_chunks(
            costs, split, rows, start=start, unit=unit, longest=longest, better_than=better_than
        )
        return found and Found(tuple(split), found[1], found[0])

    # Good ways first: with one at hand most others are cut short.
    best = min(
        (
            _in_turns(costs, even_chunks(rows, size), start, chunks_of)
            for size in range(unit, max(unit, min(longest or rows, rows)) + 1, unit)
        ),
        key=lambda found: (found.seconds, _slowest_s(costs, found.split, rows)),
    )
    if math.comb(costs.num_layers - 1, costs.stages - 1) <= exhaustive:
        for split in filter(costs.fits, all_splits(costs.num_layers, costs.stages)):
            best = chunks_of(split, best.seconds * (1.0 - SAME)) or best
    return best


def _in_turns(
    costs: Costs,
    chunks: Sequence[int],
    start: int,
    chunks_of: Callable[[Sequence[int]], Found | None],
) -> Found:
    best: Found | None = None
    for _ in range(ROUNDS):
        _, split = split_for_chunks(costs, chunks, start)
        found = chunks_of(split)
        if found is None or (best is not None and found.seconds >= best.seconds):
            break
        best, chunks = found, found.chunks
    assert best is not None  # the first round has nothing to be better than
    return best


def split_for_chunks(
    costs: Costs, chunks: Sequence[int], start: int = 0
) -> tuple[float, tuple[int, ...]]:
    """The split with the least time to the first token for given chunks; see `best_split`."""
    contexts = [start + sum(chunks[:i]) for i in range(len(chunks))]
    last, crowded = costs.stages - 1, len(chunks) > 1

    def work(rank: int, layers: int) -> list[float]:
        seconds = [
            costs.stage_s(rank, layers, rows, context, crowded=crowded)
            for rows, context in zip(chunks, contexts, strict=True)
        ]
        if rank == last:
            seconds[-1] += costs.judge_s() * (costs.crowd(rank) if crowded else 1.0)
        return seconds

    hops = [[costs.hop(rank, rows) for rank in range(costs.stages)] for rows in chunks]
    return best_split(costs, work, hops)


def split_for_steps(
    costs: Costs,
    rows: int,
    context: int,
    *,
    judge_s: float = 0.0,
    steady: bool = False,
    tolerance: float = SAME,
) -> tuple[float, tuple[int, ...]]:
    """The split with the least time of a decode step of `rows` tree nodes; see `best_split`.

    judge_s: what the last stage needs behind its layers.
    """
    last = costs.stages - 1

    def work(rank: int, layers: int) -> list[float]:
        seconds = costs.stage_s(rank, layers, rows, context, crowded=steady)
        if rank == last:
            seconds += judge_s * (costs.crowd(rank) if steady else 1.0)
        return [seconds]

    hops = [[costs.hop(rank, rows) for rank in range(costs.stages)]]
    return best_split(costs, work, hops, steady=steady, tolerance=tolerance)


def even_chunks(rows: int, size: int) -> tuple[int, ...]:
    """Chunks of one size, the last one with what is left."""
    full, rest = divmod(rows, size)
    return (size,) * full + ((rest,) if rest else ())


def all_splits(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Every way to give each of `stages` some of the layers, in their order."""
    for cuts in combinations(range(1, layers), stages - 1):
        ends = (0, *cuts, layers)
        yield tuple(b - a for a, b in pairwise(ends))


def _slowest_s(costs: Costs, split: Sequence[int], rows: int) -> float:
    return max(costs.stage_s(rank, layers, rows, 0) for rank, layers in enumerate(split))


def _no_room(costs: Costs) -> str:
    limits = ", ".join(f"{host}: {limit / 2**30:.2f} GiB" for host, limit in costs.limits().items())
    return (
        f"no split of {costs.num_layers} layers over {costs.stages} stages fits into memory "
        f"({limits or 'more stages than layers'})"
    )
