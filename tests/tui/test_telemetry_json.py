"""`--telemetry-json`: its flags, and what a line says when little is known."""

from __future__ import annotations

import pytest

from tests.tui.fake_client import CHOSEN
from tests.tui.test_telemetry import Engine, sample
from tui import cli
from tui.telemetry_json import as_json


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--telemetry-lines", "3"], "--telemetry-lines needs --telemetry-json"),
        (["--telemetry-interval", "3"], "--telemetry-interval needs --telemetry-json"),
        (["--telemetry-json", "--batch", "in.jsonl"], "give the batch an -o FILE"),
        (["--telemetry-json", "--batch", "in.jsonl", "-o", "-"], "give the batch an -o FILE"),
        (["--telemetry-json", "--telemetry-interval", "0"], "seconds from 0.1"),
        (["--telemetry-json", "--telemetry-interval", "nan"], "seconds from 0.1"),
        (["--telemetry-json", "--telemetry-lines", "0"], "a whole number from 1"),
        (["--telemetry-json", "--resume"], "--resume needs --batch"),
    ],
)
def test_flags_that_do_not_fit_are_refused_in_one_line(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    said = capsys.readouterr()
    assert end.value.code == 2
    assert complaint in said.err and said.err.count("\n") == 1
    assert said.out == ""


def test_what_was_not_measured_is_null_and_never_zero() -> None:
    engine = Engine()
    engine.ready()
    line = as_json(engine.store.view(), time_unix_s=1.0, elapsed_s=2.0)
    assert line["tokens_per_s"] is None and line["ttft_last_s"] is None
    for stage in line["stages"]:
        assert stage["contact"] == "waiting"
        known = {key for key, value in stage.items() if value is not None}
        assert known == {"rank", "first_layer", "layers", "phase", "contact"}


def test_the_tuned_tree_is_told_with_what_it_was_weighed_against() -> None:
    engine = Engine()
    engine.ready()
    assert as_json(engine.store.view(), time_unix_s=1.0, elapsed_s=2.0)["tree"] is None
    engine.event(CHOSEN)
    tree = as_json(engine.store.view(), time_unix_s=1.0, elapsed_s=2.0)["tree"]
    assert (tree["nodes"], tree["tokens_per_step"], tree["step_ms"]) == (8, 1.83, 30.0)
    assert tree["tokens_per_s"] == pytest.approx(61.0)
    assert [option["nodes"] for option in tree["options"]] == [1, 8, 64]


def test_the_numbers_are_those_of_the_screen() -> None:
    engine = Engine()
    engine.ready()
    engine.event(sample())
    engine.event(sample(busy_s=0.3, idle_s=0.1, decode_steps=3, decode_busy_s=0.03))
    view = engine.store.view()
    stage = as_json(view, time_unix_s=1.0, elapsed_s=2.0)["stages"][0]
    assert stage["memory_bytes"] == 300 and stage["memory_total_bytes"] == 1000
    assert (stage["busy_share"], stage["idle_share"]) == (0.75, 0.25)
    assert stage["decode_step_ms"] == view.stages[0].decode_step_ms == pytest.approx(10.0)
