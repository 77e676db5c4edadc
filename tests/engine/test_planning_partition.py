"""Splits and chunks by dynamic programming: the same as trying every one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from engine.errors import ConfigError
from engine.planning.costs import Costs
from engine.planning.memory import ModelSizes
from engine.planning.partition import (
    all_splits,
    best_chunks,
    best_prefill,
    even_chunks,
    split_for_chunks,
    split_for_steps,
)
from engine.planning.profiles import DeviceProfile, LinkProfile, Profile
from engine.planning.simulator import simulate

UNIT = 32


def sizes(layers: int, draw: random.Random) -> ModelSizes:
    return ModelSizes(
        num_layers=layers,
        layer=draw.randint(50, 150),
        embedding=draw.randint(0, 100),
        norm=1,
        lm_head=draw.randint(0, 100),
        heads=draw.randint(0, 50),
        num_heads=1,
        tied=False,
        quantized=False,
        token_heads=False,
        kv_layer=draw.randint(0, 20),
        activations=draw.randint(0, 30),
        judging=draw.randint(0, 30),
        max_sequences=1,
    )


def case(seed: int) -> Costs:
    """A random small pipeline: unlike devices, some on one host, some short of memory."""
    draw = random.Random(seed)
    stages = draw.randint(1, 3)
    layers = draw.randint(stages, 6)
    devices = []
    for rank in range(stages):
        speed = draw.choice((0.3, 1.0, 1.0, 2.5))
        first = tuple(sorted(speed * draw.uniform(1, 4) for _ in range(3)))
        devices.append(
            DeviceProfile(
                name=f"d{rank}",
                host=draw.choice(("", "", "one")),
                memory_bytes=draw.choice((None, draw.randint(200, 900))),
                rows=(1, 32, 128),
                contexts=(0, 256),
                layer_ms=(first, tuple(ms * draw.uniform(1, 1.5) for ms in first)),
                stage_ms=draw.uniform(0, 1),
                judge_nodes=(1, 16),
                judge_ms=tuple(sorted(draw.uniform(0, 5) for _ in range(2))),
                slowdown=draw.uniform(1.5, 2.2),
                share_slowdown=draw.uniform(1, 1.5),
            )
        )
    links = tuple(
        LinkProfile(
            latency_ms=draw.uniform(0, 3),
            mbit_per_s=draw.choice((None, 10.0, 100.0)),
            busy_ms=draw.choice((0.0, 2.0)),
        )
        for _ in range(stages if stages > 1 else 0)
    )
    profile = Profile(devices=tuple(devices), links=links)
    return Costs(profile, layers, draw.choice((0, 64, 2048)), sizes(layers, draw))


def flow_s(
    costs: Costs, work: Sequence[Sequence[float]], hops: Sequence[Sequence[object]]
) -> float:
    """The makespan by the definition: every stage and every link takes one at a time, in order."""
    free, link = [0.0] * costs.stages, [0.0] * costs.stages
    at = 0.0
    for seconds, behind in zip(work, hops, strict=True):
        at = 0.0
        for rank in range(costs.stages):
            free[rank] = max(free[rank], at) + seconds[rank]
            link[rank] = max(link[rank], free[rank]) + behind[rank].transfer_s  # type: ignore[attr-defined]
            at = link[rank] + behind[rank].latency_s  # type: ignore[attr-defined]
    return max(at, host_s(costs, work))


def host_s(costs: Costs, work: Sequence[Sequence[float]]) -> float:
    """What a host's stages together need of it."""
    longest, names, slow = 0.0, costs.profile.hosts, costs.sharing.slowdown
    for name in set(names):
        ranks = [rank for rank, host in enumerate(names) if host == name]
        if len(ranks) > 1:
            capacity = max(1.0, len(ranks) / min(slow[rank] for rank in ranks))
            longest = max(longest, sum(row[rank] for row in work for rank in ranks) / capacity)
    return longest


def chunkings(rows: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut `rows` into chunks of whole units, but for the last."""
    if rows <= UNIT:
        yield (rows,)
        return
    for size in range(UNIT, rows, UNIT):
        for rest in chunkings(rows - size):
            yield (size, *rest)
    yield (rows,)


@pytest.mark.parametrize("part", range(4))
def test_the_plan_is_as_good_as_the_best_of_all(part: int) -> None:
    fitting = 0
    for seed in range(50 * part, 50 * part + 50):
        costs = case(seed)
        rows = random.Random(seed).randint(20, 150)
        splits = [s for s in all_splits(costs.num_layers, costs.stages) if costs.fits(s)]
        if not splits:
            with pytest.raises(ConfigError, match="fits into memory"):
                best_prefill(costs, rows, unit=UNIT)
            with pytest.raises(ConfigError, match="fits into memory"):
                split_for_steps(costs, 4, 100)
            continue
        fitting += 1
        plan = best_prefill(costs, rows, unit=UNIT)
        assert costs.fits(plan.split) and sum(plan.chunks) == rows
        tried = [
            flow_s(costs, *costs.prefill(split, chunks))
            for split in splits
            for chunks in chunkings(rows)
        ]
        assert plan.seconds == pytest.approx(min(tried), rel=2e-6), seed
        assert flow_s(costs, *costs.prefill(plan.split, plan.chunks)) == pytest.approx(plan.seconds)

        chunks = even_chunks(rows, 64)
        seconds, split = split_for_chunks(costs, chunks)
        best = min(flow_s(costs, *costs.prefill(s, chunks)) for s in splits)
        assert costs.fits(split) and seconds == pytest.approx(best, rel=2e-6), seed

        judge_s = costs.judge_s(4)
        steps = {s: costs.decode(s, 4, 100, judge_s) for s in splits}
        seconds, split = split_for_steps(costs, 4, 100, judge_s=judge_s)
        best = min(flow_s(costs, [work], [hops]) for work, hops in steps.values())
        assert costs.fits(split) and seconds == pytest.approx(best, rel=2e-6), seed

        seconds, split = split_for_steps(costs, 4, 100, judge_s=judge_s, steady=True)
        crowded = {s: costs.decode(s, 4, 100, judge_s, crowded=True) for s in splits}
        best = min(
            max(*work, *(hop.transfer_s for hop in hops), host_s(costs, [work]))
            for work, hops in crowded.values()
        )
        assert costs.fits(split) and seconds == pytest.approx(best, rel=2e-6), seed
    assert fitting > 30


def test_in_turns_comes_close_to_the_best_of_all() -> None:
    worse = []
    for seed in range(40):
        costs = case(seed)
        if any(costs.fits(split) for split in all_splits(costs.num_layers, costs.stages)):
            best = best_prefill(costs, 150, unit=UNIT).seconds
            worse.append(best_prefill(costs, 150, unit=UNIT, exhaustive=0).seconds / best)
    assert min(worse) >= 1 - 1e-9 and max(worse) < 1.1
    assert sum(worse) / len(worse) < 1.01


def test_the_simulation_says_the_same_and_more_where_stages_share_a_host() -> None:
    for seed in range(60):
        costs = case(seed)
        split = next(all_splits(costs.num_layers, costs.stages))
        work, hops = costs.prefill(split, (64, 32, 96, 10))
        seconds = simulate(work, hops, costs.sharing).seconds
        if len(set(costs.profile.hosts)) == costs.stages:
            assert seconds == pytest.approx(flow_s(costs, work, hops))
        else:
            assert seconds >= flow_s(costs, work, hops) - 1e-9


def test_a_slow_device_gets_fewer_layers_and_a_small_one_no_more_than_it_holds() -> None:
    def device(ms: float, memory: int | None = None) -> DeviceProfile:
        return DeviceProfile(
            name="d", memory_bytes=memory, rows=(1, 128), layer_ms=((ms, 10 * ms),)
        )

    link = LinkProfile(latency_ms=0.1)
    fast_slow = Profile(devices=(device(1), device(4)), links=(link, link))
    costs = Costs(fast_slow, 10, 0)
    assert best_prefill(costs, 512).split[0] >= 8
    assert split_for_steps(costs, 1, 0, steady=True)[1] == (8, 2)
    assert split_for_steps(costs, 1, 0)[1] == (9, 1)  # one at a time: all to the fast one
    parts = ModelSizes(10, 100, 0, 0, 0, 0, 0, False, False, False, 0, 0, 0, 1)
    small = Profile(devices=(device(1, 500), device(4, 700)), links=(link, link))
    assert split_for_steps(Costs(small, 10, 0, parts), 1, 0)[1] == (5, 5)


def test_later_chunks_are_shorter_where_the_context_costs() -> None:
    one = DeviceProfile(
        name="d", rows=(32, 512), contexts=(0, 1024), layer_ms=((1.0, 16.0), (4.0, 64.0))
    )
    link = LinkProfile(latency_ms=0.0)
    costs = Costs(Profile(devices=(one, one), links=(link, link)), 10, 0)
    found = best_chunks(costs, (5, 5), 512)
    assert found is not None
    chunks = found[1]
    assert len(chunks) > 2 and chunks[-1] < chunks[0]
