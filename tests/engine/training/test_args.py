"""Arguments: Megatron-SWIFT's names and defaults; each has an effect, a substitute or a refusal."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

import engine
import engine.training.generate
import engine.training.launch
from engine.cli.main import main
from engine.errors import ConfigError
from engine.training.args import (
    GROUPS,
    TrainArguments,
    as_json,
    notes,
    parse_arguments,
)
from engine.training.args_check import validate
from engine.training.args_fields import Argument, arguments, is_list, show
from engine.training.args_medusa import EvalArguments, GenerateArguments
from engine.training.args_table import DOC, in_step

# The defaults of the specification; None where the model or another argument decides.
DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 1, "global_batch_size": 16, "recompute_granularity": "selective",
    "recompute_method": None, "recompute_num_layers": None, "deterministic_mode": False,
    "train_iters": None, "log_interval": 5, "tensorboard_dir": None,
    "no_masked_softmax_fusion": False, "no_bias_dropout_fusion": False,
    "no_bias_swiglu_fusion": False, "no_rope_fusion": False,
    "no_gradient_accumulation_fusion": False, "cross_entropy_loss_fusion": False,
    "use_flash_attn": False, "optimizer": "adam", "dataloader_type": "cyclic",
    "manual_gc": False, "manual_gc_interval": 0, "seed": 42, "num_workers": 4,
    "seq_length": None, "use_cpu_initialization": False,
    "no_create_attention_mask_in_dataloader": True,
    "lr": 1e-5, "lr_decay_style": "cosine", "lr_decay_iters": None, "lr_warmup_iters": 0,
    "min_lr": 0.0, "weight_decay": 0.1, "clip_grad": 1.0, "adam_beta1": 0.9,
    "adam_beta2": 0.95, "adam_eps": 1e-8, "sgd_momentum": 0.9,
    "save": None, "save_interval": 500, "no_save_optim": False, "no_save_rng": False,
    "load": None, "no_load_optim": False, "no_load_rng": False, "finetune": False,
    "ckpt_format": "torch_dist", "no_initialization": True, "auto_detect_ckpt_format": True,
    "exit_on_missing_checkpoint": True,
    "distributed_backend": "nccl", "use_distributed_optimizer": True,
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
    "sequence_parallel": False, "context_parallel_size": 1, "tp_comm_overlap": False,
    "overlap_grad_reduce": False, "overlap_param_gather": False,
    "distributed_timeout_minutes": 60.0,
    "log_params_norm": True, "log_throughput": True, "tensorboard_log_interval": 1,
    "tensorboard_queue_size": 50, "log_timers_to_tensorboard": True,
    "no_log_learning_rate_to_tensorboard": False, "log_validation_ppl_to_tensorboard": True,
    "log_memory_to_tensorboard": True, "logging_level": None,
    "eval_iters": 100, "eval_interval": None,
    "fp16": None, "bf16": None, "apply_query_key_layer_scaling": None,
    "attention_softmax_in_fp32": True,
    "num_layers": None, "hidden_size": None, "ffn_hidden_size": None,
    "num_attention_heads": None, "group_query_attention": None, "num_query_groups": None,
    "max_position_embeddings": None, "position_embedding_type": "rope", "rotary_base": None,
    "rotary_percent": 1.0, "normalization": "RMSNorm", "norm_epsilon": None, "swiglu": True,
    "untie_embeddings_and_output_weights": None, "disable_bias_linear": None,
    "add_qkv_bias": None, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "transformer_impl": "transformer_engine", "padded_vocab_size": None, "rope_scaling": None,
    "add_version": True, "lazy_tokenize": False, "packing": False, "streaming": False,
    "dataset": [], "val_dataset": [], "split_dataset_ratio": 0.01, "max_length": None,
    "system": None, "dataset_num_proc": None, "model_author": [], "model_name": [],
}  # fmt: skip
KNOWN = arguments(TrainArguments)


def words(*more: str) -> list[str]:
    return ["--dataset", "data.jsonl", *more]


def refused(argument: Argument) -> list[Any]:
    """Values of the right type that cannot be honoured."""
    hints = [part for part in get_args(argument.hint) if get_origin(part) is Literal]
    hint = hints[0] if hints else argument.hint
    values: list[Any] = [True, False, 2, 0.5, ["me"], "uniform"]
    if get_origin(hint) is Literal:
        values = list(get_args(hint))
    elif "float" in str(hint):
        values = [0.5]
    elif "bool" in str(hint):
        values = [True, False]
    elif "int" in str(hint):
        values = [2]
    elif is_list(argument):
        values = [["me"]]
    assert argument.only is not None
    return [value for value in values if value not in argument.only]


def test_every_argument_of_the_specification_is_there_with_its_default() -> None:
    assert {name: KNOWN[name].default for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("name", [name for name in KNOWN if KNOWN[name].only is not None])
def test_a_value_that_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    values = refused(KNOWN[name])
    assert values
    for value in values:
        text = show(value)
        with pytest.raises(ConfigError) as caught:
            parse_arguments(words(f"--{name}", text))
        assert str(caught.value).startswith(f"--{name} {text}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in KNOWN if KNOWN[name].instead is not None])
def test_an_argument_without_meaning_here_is_named_with_what_happens_instead(name: str) -> None:
    argument = KNOWN[name]
    assert argument.only is None
    default = {"padded_vocab_size": 7, "apply_query_key_layer_scaling": True}
    value = show(default.get(name, argument.default))
    told = notes(parse_arguments(words(f"--{name}", value)))
    assert told == [f"--{name} has no effect here: {argument.instead}"]
    assert notes(parse_arguments(words())) == []


def names_read() -> set[str]:
    """Attributes that any code of the engine reads, the arguments' definitions left out."""
    found: set[str] = set()
    for path in Path(engine.__file__).parent.rglob("*.py"):
        if path.name in ("args_training.py", "args_run.py", "args_model.py", "args_medusa.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif path.name == "args_resolve.py" and isinstance(node, ast.Constant):
                found.add(str(node.value))  # compared with the model's shape by name
    return found


@pytest.mark.parametrize("cls", [TrainArguments, GenerateArguments, EvalArguments])
def test_every_other_argument_is_read_by_some_code(cls: type) -> None:
    read = names_read()
    effective = [a.name for a in arguments(cls).values() if a.instead is None and a.only is None]
    assert [name for name in effective if name not in read] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--lr", "abc"], "--lr abc: must be a number above 0"),
        (["--lr", "nan"], "--lr nan: must be a number above 0"),
        (["--micro_batch_size", "0"], "--micro_batch_size 0: must be a whole number from 1"),
        (["--optimizer", "lion"], "--optimizer lion: must be adam or sgd"),
        (["--packing"], "--packing: needs a value"),
        (["--packing", "yes"], "--packing yes: must be true or false"),
        (["--lr", "1", "2"], "--lr 1 2: takes one value; quote one with spaces"),
        (["--lr", "1", "--lr=2"], "--lr: given twice"),
        (["--lrr", "1"], "unknown argument --lrr; did you mean --lr?"),
        (["--medusa_head_weights", "1", "x"], "--medusa_head_weights 1 x: must be a list, each "),
    ],
)
def test_a_wrong_word_is_one_line(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(words(*given))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_names_are_understood_with_dashes_equals_signs_and_megatrons_misspelling() -> None:
    args = parse_arguments(
        words("--micro-batch-size=2", "--logging_leval", "debug", "--train_iters", "none")
    )
    assert (args.micro_batch_size, args.logging_level, args.train_iters) == (2, "debug", None)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_file_of_arguments_comes_first_and_the_command_line_goes_before_it(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"args.{suffix}"
    texts = {
        "json": '{"dataset": "a.jsonl", "lr": 1e-4, "packing": true, "seed": 7}',
        "yaml": "dataset: [a.jsonl]\nlr: 1e-4\npacking: true\nseed: 7\n",
    }
    path.write_text(texts[suffix])
    args = parse_arguments([str(path), "--seed", "8"])
    assert (args.dataset, args.lr, args.packing, args.seed) == (["a.jsonl"], 1e-4, True, 8)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"lr": 1e-4,\n', "line 2: not JSON"),
        ("a.yaml", "lr: [1\nseed: 2\n", "line 2: not YAML"),
        ("a.yaml", "- lr\n", "must hold one mapping"),
        ("a.json", '{"lrr": 1}', "unknown key 'lrr'; did you mean lr?"),
        ("a.json", '{"lr": "x"}', "key 'lr' x: must be a number above 0"),
        ("a.toml", "lr = 1", "unexpected"),
    ],
)
def test_a_bad_file_of_arguments_is_one_line_with_its_name(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_arguments([str(path)])
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arguments_written_as_json_are_read_back_and_warn_of_nothing(tmp_path: Path) -> None:
    args = parse_arguments(words("--lr", "3e-4", "--cache_hidden_states", "true", "--seed", "1"))
    path = tmp_path / "args.json"
    path.write_text(json.dumps(as_json(args)))
    again = parse_arguments([str(path)])
    assert as_json(again) == as_json(args)
    assert again.cache_hidden_states == "true"
    assert notes(again) == notes(args)
    assert [note.split()[0] for note in notes(args)] == ["--lr"]


@pytest.mark.parametrize(
    ("given", "world", "message"),
    [
        (["--global_batch_size", "6"], 4, "is no multiple of 4 = micro_batch_size 1 × data-"),
        (["--pipeline_model_parallel_size", "2"], 3, "does not divide the 3 processes"),
        (["--stage_num_hidden_layers_list", "1", "2"], 1, "names 2 stages, but pipeline_model"),
        (["--medusa_head_weights", "1", "1"], 1, "2 weights for 5 heads"),
        (["--train_iters", "5", "--num_train_epochs", "1"], 1, "give one"),
        (["--train_iters", "5", "--lr_warmup_iters", "6"], 1, "is more than the 5 steps"),
        (["--min_lr", "2e-3"], 1, "--min_lr 0.002: is above medusa_lr 0.001"),
        (["--min_lr", "1e-3", "--medusa_objective", "medusa2"], 1, "is above lr 1e-5"),
        (["--heads_layout", "fasterdecoding"], 1, "set original_lm_head false"),
        (["--heads_layout", "v2", "--original_lm_head", "false"], 1, "share lm_head only"),
        (["--original_lm_head", "false", "--truncated_vocab_size", "9"], 1, "heads_layout vllm"),
        (["--medusa_objective", "medusa2", "--cache_hidden_states", "x"], 1, "the base learns"),
        (["--val_dataset", "v.jsonl", "--split_dataset_ratio", "0.1"], 1, "give one"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_numbers(
    given: list[str], world: int, message: str
) -> None:
    args = parse_arguments(words(*given))
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        validate(args, world)


def test_batches_are_shared_among_the_data_parallel_ranks() -> None:
    args = parse_arguments(words("--pipeline_model_parallel_size", "2", "--micro_batch_size", "2"))
    validate(args, 4)
    dp_size = args.data_parallel_size(4)
    assert (dp_size, args.accumulation_steps(dp_size)) == (2, 4)
    assert args.iterations(100) == 7
    assert parse_arguments(words("--num_train_epochs", "1.5")).iterations(100) == 10


def test_the_heads_layout_and_weights_follow_from_the_heads() -> None:
    shared = parse_arguments(words("--medusa_num_heads", "3"))
    own = parse_arguments(words("--original_lm_head", "false"))
    assert (shared.layout, own.layout) == ("v2", "fasterdecoding")
    assert shared.head_weights == pytest.approx((1.0, 0.8, 0.64))


def test_the_document_has_the_tables_of_the_dataclasses() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert text == in_step(text), "run python -m engine.training.args_table"


def test_each_group_is_told_of_once_and_all_arguments_are_in_a_group() -> None:
    named = [name for _, cls in GROUPS for name in arguments(cls)]
    assert sorted(named) == sorted(KNOWN)


@pytest.mark.parametrize("command", ["", "generate", "eval"])
def test_help_names_every_argument(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["medusa", *command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    names = KNOWN if not command else ["dataset", "limit", "max_new_tokens"]
    assert [name for name in names if f"--{name}\n" not in text] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lr 1e-4", "--dataset: name the data files; see jupiter medusa --help"),
        ("generate --dataset a.jsonl", "--output: name the file for the answers"),
        ("generate --output a.jsonl", "--dataset: name the prompt files"),
        ("eval --limit 3", "--dataset: name the files to evaluate on"),
    ],
)
def test_the_command_says_what_is_missing_in_one_line(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["medusa", *line.split()]) == 2
    assert capsys.readouterr().err == f"jupiter medusa: {message}\n"


def test_one_step_generates_and_then_trains_on_the_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[GenerateArguments] = []
    launched: list[list[str]] = []
    codes = iter([1, 3])
    monkeypatch.setattr(
        engine.training.generate, "generate", lambda args: asked.append(args) or next(codes)
    )
    monkeypatch.setattr(
        engine.training.launch, "launch", lambda words: launched.append(list(words)) or 0
    )
    given = ["--generate", "p.jsonl#9", "--limit", "4", "--dataset", "more.jsonl", "--lr=1e-4"]
    assert main(["medusa", *given]) == 0
    (answers,) = asked
    assert (answers.dataset, answers.limit) == (["p.jsonl#9"], 4)
    assert answers.output == "p.jsonl#9.answers.jsonl"
    args = parse_arguments(launched[0])
    assert args.generate is None
    assert args.dataset == ["more.jsonl", answers.output]
    assert args.lr == 1e-4
    assert capsys.readouterr().err.count("has no effect here") == 1  # lr, with medusa1
    assert main(["medusa", *given]) == 3  # the engine failed: nothing to train on
    assert len(launched) == 1
