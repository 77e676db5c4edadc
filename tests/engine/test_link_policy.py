"""When hidden states are rounded on their way: only where links hold the stages up."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from engine.config import parse_config
from engine.pipeline.link_policy import choose, promises_exact
from engine.pipeline.wire import LinkDtype

SIZES: dict[LinkDtype, int] = {"exact": 2304, "bfloat16": 1152, "int8": 580}


@pytest.mark.parametrize(
    ("mbit", "kind"),
    # 128 rows that are computed in 20 ms, so that they may be on their way for 5.
    [(10_000, "exact"), (480, "exact"), (470, "bfloat16"), (200, "int8"), (1, "int8")],
)
def test_the_most_exact_form_is_taken_that_holds_nobody_up(mbit: float, kind: LinkDtype) -> None:
    assert choose(SIZES, 128, 0.020, mbit) == kind


def test_a_slow_stage_needs_no_rounding_over_the_same_link() -> None:
    assert choose(SIZES, 128, 2.0, 10.0) == "exact"


def test_a_config_of_greedy_answers_promises_them_exact() -> None:
    values = {"base_model_name_or_path": "m", "stage_num_hidden_layers_list": [1, 1]}
    config = parse_config({**values, "link_dtype": "auto"}, "test")
    assert not promises_exact(config)
    assert promises_exact(replace(config, sampling="greedy"))
    assert promises_exact(replace(config, temperature=0.0))
