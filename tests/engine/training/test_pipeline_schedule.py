"""Schedules: what each stage does when."""

from __future__ import annotations

import pytest

from engine.training.parallelize import stage_layers
from engine.training.pipeline import Action, ScheduleName, schedule

CASES: list[tuple[ScheduleName, int, int, int]] = [
    *[("1f1b", stages, 1, count) for stages in (1, 2, 3, 4) for count in (1, 2, 5)],
    *[("gpipe", stages, 1, count) for stages in (1, 2, 4) for count in (1, 5)],
    *[("interleaved", s, chunks, s * n) for s in (2, 3, 4) for chunks in (2, 3) for n in (1, 2, 3)],
]


@pytest.mark.parametrize(("name", "stages", "chunks", "count"), CASES)
def test_stages_never_wait_for_each_other_in_a_circle(
    name: ScheduleName, stages: int, chunks: int, count: int
) -> None:
    plans = [list(schedule(name, stage, stages, count, chunks)) for stage in range(stages)]
    done: set[tuple[int, bool, int]] = set()  # (virtual stage, forward, micro-batch)
    at = [0] * stages
    last = stages * chunks - 1

    def place(stage: int, action: Action) -> int:
        return action.chunk * stages + stage

    def ready(stage: int) -> bool:
        if at[stage] == len(plans[stage]):
            return False
        action = plans[stage][at[stage]]
        virtual, index = place(stage, action), action.index
        if action.is_forward:
            return virtual == 0 or (virtual - 1, True, index) in done
        after = virtual == last or (virtual + 1, False, index) in done
        return after and (virtual, True, index) in done

    while movable := [stage for stage in range(stages) if ready(stage)]:
        for stage in movable:
            action = plans[stage][at[stage]]
            done.add((place(stage, action), action.is_forward, action.index))
            at[stage] += 1
    assert len(done) == stages * chunks * count * 2
    for stage, plan in enumerate(plans):
        held = [sum(1 if a.is_forward else -1 for a in plan[: n + 1]) for n in range(len(plan))]
        assert min(held) >= 0
        most = {"1f1b": stages - stage, "gpipe": count}.get(name, count * chunks)
        assert max(held) <= most


@pytest.mark.parametrize("stages", [2, 3])
def test_messages_of_interleaved_chunks_arrive_in_the_order_they_are_sent(stages: int) -> None:
    plans = [list(schedule("interleaved", s, stages, 2 * stages, 2)) for s in range(stages)]
    for stage in range(stages):
        follower = (stage + 1) % stages
        step = int(follower == 0)
        sent = [(a.chunk + step, a.index) for a in plans[stage] if a.is_forward]
        wanted = [(a.chunk, a.index) for a in plans[follower] if a.is_forward]
        assert [m for m in sent if m[0] < 2] == [m for m in wanted if m[0] >= step]


def test_layers_are_split_evenly_with_the_rest_first() -> None:
    assert stage_layers(7, 3, None) == [range(3), range(3, 5), range(5, 7)]
    assert stage_layers(7, 2, [1, 6]) == [range(1), range(1, 7)]
