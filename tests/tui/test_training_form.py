"""The form of a run: made of the argument dataclasses, checked before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.training.args import TrainArguments, parse_arguments
from engine.training.args_fields import arguments
from tui.run_folders import read_run
from tui.training_form import COMMAND, RANKS, Field, at_field, check, resumed, sections

FIELDS: dict[str, Field] = {field.name: field for _, fields in sections() for field in fields}


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "a", "response": "b"}\n')
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model folder as far as a form looks at it: its config."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_every_argument_with_an_effect_has_one_field() -> None:
    names = [field.name for _, fields in sections() for field in fields]
    assert len(names) == len(set(names))
    known = arguments(TrainArguments)
    missing = set(known) - set(names)
    assert all(known[name].instead is not None or known[name].only for name in missing)
    assert set(names) - set(known) == {RANKS, COMMAND}


def test_fields_say_what_their_arguments_say() -> None:
    assert FIELDS["medusa_objective"].choices == ("medusa1", "medusa2")
    assert FIELDS["packing"].choices == FIELDS["bf16"].choices == ("true", "false")
    assert FIELDS["dataloader_type"].choices == ("cyclic", "single")
    assert FIELDS["medusa_lr"].choices == ()
    assert FIELDS["medusa_lr"].default == "0.001"
    assert FIELDS["medusa_num_heads"].problem("0") == "must be a whole number from 1"
    assert FIELDS["medusa_lr"].problem("1e-4") is None
    assert FIELDS["dataset"].problem('"half') == "No closing quotation; quote a path with spaces"


def test_a_form_that_is_right_gives_the_words_of_the_command(data: str, model: str) -> None:
    values = {"dataset": f"{data} {data}#1", "model": model, "medusa_lr": " 2e-4 ", RANKS: "2"}
    checked = check(FIELDS, values)
    assert checked.errors == {}
    assert checked.ranks == 2
    args = parse_arguments(checked.words)
    assert args.dataset == [data, f"{data}#1"]
    assert args.medusa_lr == 2e-4
    assert args.given == {"dataset", "model", "medusa_lr"}
    assert checked.command.startswith("jupiter medusa --model ")


def test_another_command_has_its_own_fields_alone(data: str, model: str) -> None:
    values = {COMMAND: "sft", "dataset": data, "model": model, "lr": "1e-4", "medusa_lr": "half"}
    checked = check(FIELDS, values)
    assert (checked.errors, checked.notes) == ({}, {})
    expected = ["--model", model, "--dataset", data, "--lr", "1e-4"]
    assert checked.words == expected
    assert checked.command.startswith("jupiter sft --model ")
    assert list(check(FIELDS, {**values, COMMAND: "medusa"}).errors) == ["medusa_lr"]


@pytest.mark.parametrize(
    ("values", "name", "problem"),
    [
        ({"dataset": ""}, "dataset", "name the data files"),
        ({"dataset": "gone.jsonl"}, "dataset", "gone.jsonl: no such file"),
        ({"val_dataset": "pyproject.toml"}, "val_dataset", "not a data file"),
        ({"medusa_num_heads": "five"}, "medusa_num_heads", "must be a whole number from 1"),
        ({"model": "no/such/model"}, "model", "no such folder or file"),
        ({"global_batch_size": "3", RANKS: "2"}, "global_batch_size", "is no multiple of 2"),
        ({"train_iters": "5", "num_train_epochs": "2"}, "num_train_epochs", "give one"),
        ({"max_length": "999"}, "max_length", "the model's context is 128 tokens"),
        ({"hidden_size": "16"}, "hidden_size", "has 32"),
        ({"load": "nowhere"}, "load", "holds no checkpoint"),
        ({RANKS: "0"}, RANKS, "must be a whole number from 1"),
    ],
)
def test_what_is_wrong_is_told_at_its_field(
    values: dict[str, str], name: str, problem: str, data: str, model: str
) -> None:
    checked = check(FIELDS, {"dataset": data, "model": model, **values})
    assert list(checked.errors) == [name]
    assert problem in checked.errors[name]


def test_a_field_without_effect_beside_the_others_says_so(data: str, model: str) -> None:
    values = {"dataset": data, "model": model, "lr": "1e-4"}
    checked = check(FIELDS, values)
    assert checked.errors == {}
    assert list(checked.notes) == ["lr"]
    assert "the heads learn at medusa_lr" in checked.notes["lr"]
    assert check(FIELDS, {**values, "medusa_objective": "medusa2"}).notes == {}


def test_an_error_of_the_run_finds_its_field() -> None:
    values = {"dataset": "a.jsonl b.jsonl#7"}
    assert at_field("--train_iters 5: is too few", FIELDS, values) == ("train_iters", "is too few")
    told = "b.jsonl: line 2: not JSON"
    assert at_field(told, FIELDS, values) == ("dataset", told)
    assert at_field("rank 1 was killed", FIELDS, values) is None


def test_a_run_is_gone_on_with_as_it_was_told(tmp_path: Path, data: str, model: str) -> None:
    words = ["--dataset", data, "--model", model, "--medusa_lr", "0.0003", "--packing", "true"]
    args = parse_arguments(words)
    run = tmp_path / "runs" / "v0-20260101-000000"
    run.mkdir(parents=True)
    told = {name: getattr(args, name) for name in arguments(TrainArguments)}
    (run / "args.json").write_text(json.dumps(told))
    (run / "latest_checkpointed_iteration.txt").write_text("5\n")
    values = resumed(read_run(run), FIELDS)
    assert (values["load"], values["save"]) == (str(run), str(run.parent))
    again = parse_arguments(check(FIELDS, values).words)
    assert (again.medusa_lr, again.packing, again.dataset) == (0.0003, True, [data])
