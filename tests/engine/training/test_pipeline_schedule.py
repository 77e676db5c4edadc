"""1F1B: what each stage does when."""

from __future__ import annotations

import pytest

from engine.training.parallelize import stage_layers
from engine.training.pipeline import schedule


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_stages_never_wait_for_each_other_in_a_circle(stages: int, count: int) -> None:
    plans = [list(schedule(stage, stages, count)) for stage in range(stages)]
    done: set[tuple[int, bool, int]] = set()
    at = [0] * stages

    def ready(stage: int) -> bool:
        if at[stage] == len(plans[stage]):
            return False
        forward, index = plans[stage][at[stage]]
        if forward:
            return stage == 0 or (stage - 1, True, index) in done
        return stage == stages - 1 or (stage + 1, False, index) in done

    while movable := [stage for stage in range(stages) if ready(stage)]:
        for stage in movable:
            done.add((stage, *plans[stage][at[stage]]))
            at[stage] += 1
    assert len(done) == stages * count * 2
    for stage, plan in enumerate(plans):
        held = [sum(1 if f else -1 for f, _ in plan[: n + 1]) for n in range(len(plan))]
        assert min(held) >= 0
        assert max(held) <= stages - stage


def test_layers_are_split_evenly_with_the_rest_first() -> None:
    assert stage_layers(7, 3, None) == [range(3), range(3, 5), range(5, 7)]
    assert stage_layers(7, 2, [1, 6]) == [range(1), range(1, 7)]
