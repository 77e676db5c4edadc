"""Saving a split changes one key of the user's file and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config import load_config
from engine.config_file import save_split
from engine.errors import ConfigError

TEXT = """{
    "temperature": 0.25,
    "base_model_name_or_path": "org/modèle",
    "stage_num_hidden_layers_list": [
        15,
        15
    ],
  "torch_dtype":   "bfloat16"
}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_only_the_split_changes(config: Path) -> None:
    config.chmod(0o640)
    save_split(config, (10, 10, 10))
    saved = config.read_text(encoding="utf-8")
    assert saved == TEXT.replace("[\n        15,\n        15\n    ]", "[10, 10, 10]")
    assert load_config(str(config)).stage_num_hidden_layers_list == [10, 10, 10]
    assert config.stat().st_mode & 0o777 == 0o640
    assert list(config.parent.iterdir()) == [config]


def test_a_key_of_the_same_name_elsewhere_is_left_alone(config: Path) -> None:
    values = {"keymap": {"stage_num_hidden_layers_list": []}, **json.loads(TEXT)}
    config.write_text(json.dumps(values))
    save_split(config, (30,))
    saved = json.loads(config.read_text())
    assert saved == {**values, "stage_num_hidden_layers_list": [30]}
    assert list(saved) == list(values)


def test_a_file_without_the_key_gets_it(config: Path) -> None:
    config.write_text('{"base_model_name_or_path": "m"}')
    save_split(config, (3, 3))
    assert json.loads(config.read_text()) == {
        "base_model_name_or_path": "m",
        "stage_num_hidden_layers_list": [3, 3],
    }


def test_a_link_stays_a_link(config: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(config)
    save_split(link, (30,))
    assert link.is_symlink()
    assert load_config(str(config)).stage_num_hidden_layers_list == [30]


def test_a_new_file_takes_the_other_keys_from_another(config: Path, tmp_path: Path) -> None:
    new = tmp_path / "mine" / "config.json"
    new.parent.mkdir()
    save_split(new, (20, 10), source=config)
    assert config.read_text(encoding="utf-8") == TEXT
    assert load_config(str(new)).torch_dtype == "bfloat16"


def test_what_cannot_be_read_or_written_is_named_and_left_as_it_is(
    config: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "nowhere" / "config.json"
    with pytest.raises(ConfigError, match="nowhere"):
        save_split(missing, (30,), source=config)
    config.write_text("{damaged")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        save_split(config, (30,))
    assert config.read_text() == "{damaged"
