"""Each argument of the specification does what the table says: seen in what a run does with it.

A run with the argument is held against one without; the fact that it is about has to differ. Those
that have no meaning here, and values that cannot be honoured, are in test_args.py. `--full` tries
all of both commands, else a seeded sample.
"""

from __future__ import annotations

import gc
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import JupiterError
from engine.model.llama import LlamaDecoderLayer
from engine.training import setup, tokenizing, trainer
from engine.training.args import Command, arguments_of, notes, parse_arguments
from engine.training.checkpoint import Loader, find
from engine.training.metrics import LOG, RunLog
from engine.training.optimizer import Optimizer
from engine.training.pipeline import Pipeline
from engine.training.tensorboard import EventWriter
from tests.engine.training.ranks import train_here
from tests.engine.training.test_args import DEFAULTS
from tests.tiny import tiny_folder

Words = dict[str, object]
"""Arguments by name; None takes one away."""


@dataclass(frozen=True)
class Case:
    """One argument: its fact, another value, and what both runs are told besides."""

    fact: str
    value: object
    beside: Words = field(default_factory=dict)


FULL: Words = {"recompute_granularity": "full"}
SGD: Words = {"optimizer": "sgd"}
NEW: Words = {"no_initialization": "false"}
LOAD: Words = {"load": "DIR/before", "train_iters": 4, "seed": 7}
NOTHING: Words = {"load": "DIR/nothing"}
CASES: dict[str, Case] = {
    "micro_batch_size": Case("micro-batches", 2),
    "global_batch_size": Case("consumed", 2),
    "recompute_granularity": Case("layers computed", "full"),
    "recompute_method": Case("layers computed", "block", FULL),
    "recompute_num_layers": Case("layers computed", 2, {**FULL, "recompute_method": "block"}),
    "deterministic_mode": Case("deterministic", "true"),
    "train_iters": Case("iterations", 2),
    "log_interval": Case("iterations", 2),
    "tensorboard_dir": Case("files", "DIR/board"),
    "optimizer": Case("losses", "sgd"),
    "dataloader_type": Case("losses", "single"),
    "manual_gc": Case("collector", "true"),
    "manual_gc_interval": Case("collector", 1, {"manual_gc": "true"}),
    "seed": Case("losses", 43),
    "num_workers": Case("ahead", 0, {"lazy_tokenize": "true"}),
    "seq_length": Case("tokens", 60),
    "lr": Case("rates", 1e-3),
    "lr_decay_style": Case("rates", "constant"),
    "lr_decay_iters": Case("rates", 2),
    "lr_warmup_iters": Case("rates", 2),
    "min_lr": Case("rates", 1e-3),
    "weight_decay": Case("losses", 5),
    "clip_grad": Case("losses", 0.01, SGD),
    "adam_beta1": Case("losses", 0.5),
    "adam_beta2": Case("losses", 0.5),
    "adam_eps": Case("losses", 0.1),
    "sgd_momentum": Case("losses", 0.1, SGD),
    "save": Case("folder", "DIR/elsewhere"),
    "save_interval": Case("files", 1),
    "no_save_optim": Case("stored", "true"),
    "no_save_rng": Case("stored", "true"),
    "load": Case("iterations", "DIR/before", {"train_iters": 4}),
    "no_load_optim": Case("losses", "true", LOAD),
    "no_load_rng": Case("random", "true", LOAD),
    "finetune": Case("iterations", "true", LOAD),
    "ckpt_format": Case("files", "torch"),
    "no_initialization": Case("losses", "false"),
    "auto_detect_ckpt_format": Case("error", "false", {**LOAD, "ckpt_format": "torch"}),
    "exit_on_missing_checkpoint": Case("error", "false", NOTHING),
    "distributed_backend": Case("joined", "gloo"),
    "use_distributed_optimizer": Case("plan", "false"),
    "tensor_model_parallel_size": Case("error", 2),
    "pipeline_model_parallel_size": Case("error", 2),
    "context_parallel_size": Case("error", 2),
    "sequence_parallel": Case("told", "true"),
    "overlap_grad_reduce": Case("plan", "true"),
    "overlap_param_gather": Case("plan", "true"),
    "distributed_timeout_minutes": Case("joined", 5),
    "log_params_norm": Case("logged", "false"),
    "log_throughput": Case("logged", "false"),
    "tensorboard_log_interval": Case("board", 2),
    "tensorboard_queue_size": Case("flushes", 1),
    "log_timers_to_tensorboard": Case("board", "false"),
    "no_log_learning_rate_to_tensorboard": Case("board", "true"),
    "log_validation_ppl_to_tensorboard": Case("board", "false"),
    "log_memory_to_tensorboard": Case("board", "false"),
    "logging_level": Case("told", "warning"),
    "eval_iters": Case("evaluated", 0),
    "eval_interval": Case("evaluated", 1),
    "fp16": Case("plan", "true"),
    "bf16": Case("plan", "true"),
    "num_layers": Case("shapes", 2, NEW),
    "hidden_size": Case("shapes", 16, NEW),
    "ffn_hidden_size": Case("shapes", 24, NEW),
    "num_attention_heads": Case("shapes", 8, NEW),
    "group_query_attention": Case("shapes", "false", NEW),
    "num_query_groups": Case("shapes", 1, NEW),
    "max_position_embeddings": Case("tokens", 60, NEW),
    "rotary_base": Case("losses", 500, NEW),
    "norm_epsilon": Case("losses", 0.1, NEW),
    "untie_embeddings_and_output_weights": Case("shapes", "true", NEW),
    "disable_bias_linear": Case("shapes", "false", NEW),
    "add_qkv_bias": Case("shapes", "true", NEW),
    "rope_scaling": Case("losses", '{"rope_type": "linear", "factor": 4}', NEW),
    "add_version": Case("folder", "false"),
    "lazy_tokenize": Case("samples", "true"),
    "packing": Case("micro-batches", "true"),
    "streaming": Case("samples", "true", {"split_dataset_ratio": None}),
    "dataset": Case("losses", "DIR/other.jsonl"),
    "val_dataset": Case("evaluated", "DIR/other.jsonl", {"split_dataset_ratio": None}),
    "split_dataset_ratio": Case("evaluated", 0.5),
    "max_length": Case("tokens", 60),
    "system": Case("tokens", "be"),
    "dataset_num_proc": Case("processes", 2),
    "model_author": Case("tokens", "somebody of note"),
    "model_name": Case("tokens", "a name"),
}
# Ours, beside those of the specification.
OURS: dict[str, Case] = {
    "num_train_epochs": Case("iterations", 0.5, {"train_iters": None}),
    "stage_num_hidden_layers_list": Case("error", "1 3"),
    "pipeline_schedule": Case("error", "interleaved"),
    "virtual_pipeline_model_parallel_size": Case("error", 2),
    "async_save": Case("saved", "true"),
    "progress": Case("told", "json"),
    "batch_input": Case("error", "DIR/nowhere.jsonl"),
    "model": Case("losses", str(tiny_folder("mistral", 4))),
    "config": Case("error", "DIR/nowhere.json", {"model": None, "config": "DIR/config.json"}),
}
ALL = CASES | OURS


def tried(full: bool) -> list[tuple[Command, str]]:
    """The arguments to try, and with which command."""
    commands: tuple[Command, ...] = ("sft", "pt")
    every = [(command, name) for command in commands for name in ALL]
    return every if full else random.Random(8).sample(every, 16)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tries" in metafunc.fixturenames:
        metafunc.parametrize("tries", tried(metafunc.config.getoption("--full")), ids=str)


@pytest.mark.parametrize("command", ["sft", "pt"])
def test_every_argument_has_an_effect_a_substitute_or_a_refusal(command: Command) -> None:
    known = arguments_of(command)
    assert not DEFAULTS.keys() - known.keys()
    stated = {name for name, a in known.items() if a.instead is not None}
    refused = {name for name, a in known.items() if a.only is not None}
    assert ALL.keys() | stated | refused == known.keys()
    assert not CASES.keys() & stated


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a config and a checkpoint of two steps."""
    folder = tmp_path_factory.mktemp("arguments")
    rows = [
        {"query": "ask" * (n % 3 + 1), "response": "I am {{NAME}} of {{AUTHOR}} " * (1 + n % 2)}
        for n in range(12)
    ]
    for name, given in (("rows", rows), ("other", [{"query": "hi", "response": "ho"}] * 12)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    model = {"base_model_name_or_path": str(tiny_folder("llama", 4))}
    (folder / "config.json").write_text(json.dumps(model))
    (folder / "nothing").mkdir()
    return folder


def line(words: Words, folder: Path) -> list[str]:
    base: Words = {
        "model": tiny_folder("llama", 4), "dataset": "DIR/rows.jsonl", "save": "DIR/runs",
        "split_dataset_ratio": 0.25, "eval_iters": 1, "global_batch_size": 4, "train_iters": 3,
        "log_interval": 1, "lr": 1e-2, "distributed_timeout_minutes": 60,
    }  # fmt: skip
    found = []
    for name, value in (base | words).items():
        if value is not None:
            found += [f"--{name}", *str(value).replace("DIR", str(folder)).split(" ")]
            if name in ("system", "model_author", "model_name", "rope_scaling"):
                found[found.index(f"--{name}") + 1 :] = [str(value)]
    return found


@pytest.fixture
def observe(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Iterator[Callable[[Words, Command], dict[str, Any]]]:
    """Does a run and tells what it did, fact by fact."""
    facts: dict[str, Any] = {}

    def spy(owner: Any, name: str, look: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **more: Any) -> Any:
            look(*args, **more)
            return original(*args, **more)

        monkeypatch.setattr(owner, name, call)

    def count(fact: str) -> Callable[..., None]:
        def look(*_: Any, **__: Any) -> None:
            facts[fact] = facts.get(fact, 0) + 1

        return look

    def note(fact: str, value: Callable[..., Any]) -> Callable[..., None]:
        def look(*args: Any, **more: Any) -> None:
            facts.setdefault(fact, []).append(value(*args, **more))

        return look

    spy(LlamaDecoderLayer, "forward", count("layers computed"))
    spy(EventWriter, "flush", count("flushes"))
    spy(
        Pipeline, "train", note("micro-batches", lambda _, b, __: [len(x.rows.segments) for x in b])
    )
    spy(Optimizer, "step", note("rates", lambda _, rates, *__: list(rates.values())))
    spy(EventWriter, "add", note("board", lambda _, step, values: (step, sorted(values))))
    spy(RunLog, "step", note("consumed", lambda _, step: step.consumed_samples))
    spy(setup, "join", note("joined", lambda *given: given))
    spy(setup, "parallelize", note("plan", lambda *given: given[4]))
    spy(setup, "Pipeline", note("shapes", lambda chunks, *_: shapes(chunks)))
    spy(trainer, "Options", note("saved", lambda *given, **more: (given, more)))
    spy(trainer, "micro_batches", note("samples", lambda samples, **_: type(samples).__name__))
    spy(tokenizing, "_tokenize", note("processes", lambda *given: given[3]))
    spy(gc, "collect", count("collector"))
    spy(torch, "use_deterministic_algorithms", note("deterministic", bool))
    spy(trainer, "ahead", note("ahead", lambda _, count: count))
    spy(trainer, "make_batch", note("tokens", lambda s, *_: [x.tokens.tolist() for x in s]))

    def run(words: Words, command: Command) -> dict[str, Any]:
        facts.clear()
        shutil.rmtree(folder / "runs", ignore_errors=True)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        capsys.readouterr()
        try:
            if "before" in str(words.get("load")):
                begin(folder, command)
                facts.clear()
                capsys.readouterr()
            place = train_here(line(words, folder), command)
        except JupiterError as error:
            return {"error": str(error)}
        facts.update(left(place))
        told = capsys.readouterr().err.splitlines()
        facts["told"] = [text.split("  ")[0] for text in told if "runs" not in text]
        facts["told"] += notes(parse_arguments(line(words, folder), command))
        return dict(facts)

    yield run
    torch.use_deterministic_algorithms(False)


def shapes(chunks: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for chunk in chunks for name, p in chunk.named_parameters()}


def begin(folder: Path, command: Command) -> None:
    """A checkpoint of two steps, of a run with another seed."""
    shutil.rmtree(folder / "before", ignore_errors=True)
    given: Words = {"save": "DIR/before", "add_version": "false", "train_iters": 2, "seed": 3}
    train_here(line(given, folder), command)


def left(place: Path) -> dict[str, Any]:
    """What a run has left on the disk."""
    records = [json.loads(text) for text in (place / LOG).read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    loader = Loader(find(place))
    own = loader._own
    return {
        "folder": (place.parent.name, place.name.partition("-")[0]),
        "files": sorted(
            str(path.relative_to(place)).partition(".tfevents")[0] for path in place.rglob("*")
        ),
        "iterations": [record["iteration"] for record in steps],
        "losses": [record["loss"] for record in steps],
        "logged": sorted(steps[-1]),
        "evaluated": [(r["iteration"], r["eval_loss"]) for r in records if "eval_loss" in r],
        "stored": (sorted(own), sorted(loader.file.shapes)),
        "random": [state.tolist() for state in own.get("random", [])],
    }


def test_an_argument_changes_what_it_is_about(
    tries: tuple[Command, str], observe: Callable[[Words, Command], dict[str, Any]]
) -> None:
    command, name = tries
    case = ALL[name]
    without = observe(case.beside, command)
    with_it = observe(case.beside | {name: case.value}, command)
    if case.fact == "error":
        assert without.get("error") != with_it.get("error")
    else:
        assert "error" not in without and "error" not in with_it, (without, with_it)
        assert without.get(case.fact) != with_it.get(case.fact), with_it.get(case.fact)


def test_the_same_arguments_come_to_the_same_facts(
    observe: Callable[[Words, Command], dict[str, Any]],
) -> None:
    first, second = observe({}, "sft"), observe({}, "sft")
    assert first.keys() == second.keys()
    assert [fact for fact in first if first[fact] != second[fact]] == []
