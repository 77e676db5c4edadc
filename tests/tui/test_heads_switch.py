"""A finished run's heads in the chat: the config for them, and the questions to measure on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from engine.config import JupiterConfig
from engine.errors import ConfigError, JupiterError
from tui.heads_switch import Measured, config_with, heads_name, same_answers, sample
from tui.run_folders import RunFolder, read_run
from tui.screens.heads import side_by_side

MakeRun = Callable[..., RunFolder]


def model(folder: Path, layers: int) -> str:
    folder.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def config(tmp_path: Path) -> JupiterConfig:
    return JupiterConfig(
        base_model_name_or_path=model(tmp_path / "chat-model", 6),
        medusa_head_path="old",
        medusa_num_heads=5,
        medusa_choices=[[0], [0, 0]],
        stage_num_hidden_layers_list=[2, 4],
    )


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(base: str = "", **args: object) -> RunFolder:
        run = tmp_path / "v0-20260101-000000"
        (run / "heads").mkdir(parents=True)
        (run / "args.json").write_text(json.dumps(args))
        (run / "heads" / "config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        return read_run(run)

    return make


def test_the_heads_replace_the_old_ones_and_all_that_belongs_to_these(
    config: JupiterConfig, make_run: MakeRun
) -> None:
    run = make_run(config.base_model_name_or_path)
    changed = config_with(config, run)
    assert changed == replace(
        config,
        medusa_head_path=str(run.heads),
        medusa_num_heads=None,
        medusa_num_layers=None,
        medusa_choices="auto",
    )
    assert heads_name(changed) == "v0-20260101-000000/heads"


def test_heads_of_another_model_bring_their_model_with_as_many_stages(
    config: JupiterConfig, make_run: MakeRun, tmp_path: Path
) -> None:
    other = model(tmp_path / "other", 7)
    changed = config_with(config, make_run(other))
    assert changed.base_model_name_or_path == other
    assert changed.stage_num_hidden_layers_list == [4, 3]


def test_a_trained_base_goes_with_its_heads(config: JupiterConfig, make_run: MakeRun) -> None:
    run = make_run(config.base_model_name_or_path)
    trained = model(run.path / "model", 6)
    changed = config_with(config, read_run(run.path))
    assert changed.base_model_name_or_path == trained
    assert changed.stage_num_hidden_layers_list == [2, 4]


def test_a_run_without_heads_is_refused(config: JupiterConfig, make_run: MakeRun) -> None:
    run = make_run()
    (run.path / "heads" / "config.json").unlink()
    (run.path / "heads").rmdir()
    with pytest.raises(ConfigError, match="has no heads"):
        config_with(config, read_run(run.path))


def test_the_questions_are_rows_that_were_held_out(make_run: MakeRun, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"query": f"q{n}", "response": "a"} for n in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make_run(dataset=[str(data)], split_dataset_ratio=0.2, system="Be brief.")
    found = sample(run)
    assert len(found.questions) == 4
    assert all([m.role for m in question] == ["system", "user"] for question in found.questions)
    assert "not trained on" in found.origin
    trained = replace_args(run, split_dataset_ratio=0.0)
    assert "that the heads were trained on" in sample(trained).origin


def test_texts_and_lost_files_hold_no_questions(make_run: MakeRun, tmp_path: Path) -> None:
    data = tmp_path / "texts.txt"
    data.write_text("one\n\ntwo\n")
    run = make_run(dataset=[str(data)])
    with pytest.raises(ConfigError, match="no row has a question"):
        sample(run)
    data.unlink()
    with pytest.raises(JupiterError, match=r"texts\.txt"):
        sample(run)


def replace_args(run: RunFolder, **args: object) -> RunFolder:
    (run.path / "args.json").write_text(json.dumps({**run.args, **args}))
    return read_run(run.path)


def test_the_table_puts_figures_side_by_side_and_unknown_ones_are_na() -> None:
    before = Measured(0, 1, ((1, 2),), 10, 10.0, 2.0, (), ())
    after = Measured(2, 17, ((1, 2),), 4, 10.0, 1.0, (4, 4), (3, 1))
    lines = str(side_by_side(before, after)).splitlines()
    cells = {line[:18].strip(): line[18:].split() for line in lines}
    assert cells["tokens per step"] == ["1.00", "2.50"]
    assert cells["speed"] == ["5.00", "tok/s", "10.0", "tok/s"]
    assert cells["head 1 accepted"] == ["n/a", "3/4", "75", "%"]
    assert cells["head 2 accepted"] == ["n/a", "1/4", "25", "%"]
    assert same_answers(before, after)
    nothing = Measured(2, 17, ((),), 0, 0.0, 0.0, (0,), (0,))
    assert "n/a" in str(side_by_side(before, nothing))
    assert "were not the same" in str(side_by_side(before, nothing))


def test_the_training_screens_import_no_torch() -> None:
    code = "import tui.screens.training, tui.screens.heads, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"torch", "transformers", "numpy"} & set(done.stdout.split())
