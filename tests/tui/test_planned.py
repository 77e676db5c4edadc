"""The planner's split and predictions in the stage editor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config import JupiterConfig
from engine.errors import ConfigError
from tests.tiny import tiny_folder
from tui.planned import Planner
from tui.stage_draft import StageDraft


def config(tmp_path: Path) -> JupiterConfig:
    """A tiny model, on a slow device before a fast one."""
    devices = [
        {"name": "d", "rows": [1, 256], "layer_ms": [[ms, 20 * ms]], "judge_ms": [0.5]}
        for ms in (4.0, 1.0)
    ]
    link = {"latency_ms": 0.1}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"devices": devices, "links": [link, link]}))
    return JupiterConfig(
        base_model_name_or_path=str(tiny_folder()),
        stage_num_hidden_layers_list=[3, 3],
        plan_profile=str(path),
        plan_aim="ttft",
    )


def test_the_planned_split_and_what_it_would_take(tmp_path: Path) -> None:
    planner = Planner.load_for(config(tmp_path), tiny_folder(), 2)
    split = planner.split()
    assert sum(split) == 6 and split[0] < split[1]
    lines = planner.lines((3, 3), split)
    assert [line.label for line in lines] == [
        "planner: first token of 512",
        "planner: per token",
        "planner: bubbles",
    ]
    before, after = planner.predict((3, 3)), planner.predict(split)
    assert before and after and after.token_s < before.token_s
    assert lines[0].draft.startswith("≈") and lines[0].draft.endswith(" ms")
    assert planner.lines((3, 3), (2, 2, 2))[0].draft == "n/a"  # of other stages nothing is known


def test_without_a_profile_it_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPITER_CACHE_DIR", str(tmp_path))
    one = JupiterConfig(
        base_model_name_or_path=str(tiny_folder()), stage_num_hidden_layers_list=[3, 3]
    )
    with pytest.raises(ConfigError, match="jupiter plan --stages 3"):
        Planner.load_for(one, tiny_folder(), 3)


def test_a_draft_takes_a_split_of_its_own_model_only() -> None:
    draft = StageDraft.of((3, 3))
    assert draft.take((2, 4)).split == (2, 4)
    assert draft.take((2, 5)) == draft
