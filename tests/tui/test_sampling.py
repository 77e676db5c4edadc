"""Sampling parameters as they are typed."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from engine.protocol import SamplingParams
from tests.tui.fake_client import CONFIG
from tui.sampling import FIELDS, checked, left_to_config, shown, to_go_on, with_values


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("temperature", " 0 ", 0.0),
        ("temperature", "1.5", 1.5),
        ("top_p", "1", 1.0),
        ("max_tokens", "200", 200),
        ("seed", "-3", -3),
        ("seed", "  ", None),
    ],
)
def test_a_good_value_is_taken(field: str, text: str, value: float | None) -> None:
    assert checked(field, text) == value


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("temperature", "-0.1"),
        ("temperature", "nan"),
        ("temperature", "inf"),
        ("temperature", "hot"),
        ("top_p", "0"),
        ("top_p", "1.01"),
        ("max_tokens", "0"),
        ("max_tokens", "1.5"),
        ("seed", "x"),
        ("seed", str(2**63)),
    ],
)
def test_a_wrong_value_is_refused_with_what_would_be_right(field: str, text: str) -> None:
    with pytest.raises(ValueError, match="number"):
        checked(field, text)


def test_what_is_shown_is_what_was_typed() -> None:
    params = SamplingParams(temperature=0.2, max_tokens=50, stop=("x",))
    texts = [shown(params, field) for field in FIELDS]
    assert texts == ["0.2", "", "50", ""]
    values = {field: checked(field, text) for field, text in zip(FIELDS, texts, strict=True)}
    assert with_values(SamplingParams(stop=("x",)), values) == params


def test_the_config_says_what_an_empty_field_means() -> None:
    assert left_to_config("temperature", CONFIG) == "0.7"
    assert left_to_config("temperature", replace(CONFIG, sampling="greedy")) == "not used (greedy)"
    assert left_to_config("top_p", CONFIG) == "not used (typical)"
    assert left_to_config("top_p", replace(CONFIG, sampling="nucleus")) == "0.8"


def test_a_continued_answer_gets_its_limit_anew() -> None:
    assert to_go_on(SamplingParams(max_tokens=50), CONFIG, 30).max_tokens == 80
    assert to_go_on(SamplingParams(), replace(CONFIG, max_new_tokens=20), 30).max_tokens == 50
    assert to_go_on(SamplingParams(), CONFIG, 30).max_tokens is None
