"""Stopping and going on: the losses of a run that was never stopped."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError, ConfigError, EngineError
from engine.training.checkpoint import find
from engine.training.figures import Step
from engine.training.hidden_cache import HiddenCache
from engine.training.metrics import RunLog
from tests.engine.training.ranks import Ranks, records, steps, train_here, without
from tests.tiny import tiny_folder

STOP, END = 3, 6


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"query": "abc"[n % 3] * 4, "response": "".join(chr(97 + (i * n) % 20) for i in range(n))}
        for n in range(3, 14)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # fmt: off
    return [
        "--model", str(tiny_folder(layers=3)), "--dataset", str(path),
        "--save", str(tmp_path / "runs"), "--split_dataset_ratio", "0.2", "--eval_iters", "2",
        "--log_interval", "1", "--global_batch_size", "4", "--medusa_num_heads", "2",
        "--lr", "1e-3", "--logging_level", "warning", "--train_iters", str(END),
        "--save_interval", str(STOP), "--medusa_objective", "medusa2", "--medusa_warmup_iters", "1",
    ]
    # fmt: on


def stages(count: int) -> list[str]:
    return ["--pipeline_model_parallel_size", str(count)]


def from_step(run: Path, folder: str = f"iter_{STOP:07}") -> list[str]:
    return ["--load", str(run / folder)]


def figures(run: Path) -> list[Any]:
    keys = ("iteration", "loss", "eval_loss", "grad_norm", "learning_rate", "consumed_samples")
    return [record[key] for record in records(run) for key in keys if key in record]


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 1), (1, 1)), ((2, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (4, 2)), ((4, 2), (2, 1))],
    ids=str,
)
def test_a_resumed_run_goes_on_as_if_never_stopped(
    before: tuple[int, int], after: tuple[int, int], ranks: Ranks, words: list[str]
) -> None:
    whole = ranks.train(before[0], [*words, *stages(before[1])])
    rest = ranks.train(after[0], [*words, *stages(after[1]), *from_step(whole)])
    expected = figures(whole)[-len(figures(rest)) :]
    assert steps(rest)[0]["iteration"] == STOP + 1
    assert figures(rest) == pytest.approx(expected, rel=1e-5)


TP2, PP2 = ["--tensor_model_parallel_size", "2"], ["--pipeline_model_parallel_size", "2"]
SP, CP2 = ["--sequence_parallel", "true"], ["--context_parallel_size", "2"]
LAYOUTS = {"1": (1, []), "tp2": (2, TP2), "pp2": (2, PP2), "dp2": (2, []), "cp2": (2, CP2)} | {
    "tp2 sp dp2": (4, [*TP2, *SP]),
    "pp2 dp2 interleaved": (4, [*PP2, "--pipeline_schedule", "interleaved"]),
}


@pytest.mark.parametrize("option", ["torch_dist", "torch_dist async", "torch"])
def test_the_model_itself_goes_on_at_any_parallel_layout(
    option: str, ranks: Ranks, words: list[str], full: bool
) -> None:
    kind, _, background = option.partition(" ")
    alone = ["--medusa_num_heads", "--medusa_objective", "--medusa_warmup_iters"]
    for name in alone:
        words = without(words, name)
    words = [*words, "--ckpt_format", kind, *(["--async_save", "true"] if background else [])]
    words[words.index("--model") + 1] = str(tiny_folder("qwen2", 4))

    def run(layout: str, *more: str) -> Path:
        world, shares = LAYOUTS[layout]
        return ranks.train(world, [*words, *shares, *more], "sft")

    pairs = [("tp2", after) for after in ("pp2", "1")]
    if full:
        pairs = [(before, after) for before in LAYOUTS for after in LAYOUTS]
    elif kind == "torch":
        pairs = [("tp2", "dp2")]
    elif background:
        pairs = [("pp2 dp2 interleaved", "tp2 sp dp2")]
    for before in dict.fromkeys(before for before, _ in pairs):
        whole = run(before)
        for after in (after for each, after in pairs if each == before):
            rest = run(after, *from_step(whole))
            expected = figures(whole)[-len(figures(rest)) :]
            assert figures(rest) == pytest.approx(expected, rel=1e-4), (before, after)


def test_the_run_folder_itself_names_its_latest_checkpoint(words: list[str]) -> None:
    first = train_here([*words, "--lr_decay_iters", "9"])
    more = without(words, "--train_iters")
    second = train_here([*more, "--train_iters", "9", "--load", str(first)])
    assert [step["iteration"] for step in steps(second)] == [7, 8, 9]
    assert steps(second)[0]["consumed_samples"] == 7 * 4


def test_a_finished_run_has_nothing_left_to_do(words: list[str]) -> None:
    run = train_here(words)
    with pytest.raises(ConfigError, match=f"is at step {END} already"):
        train_here([*words, "--load", str(run)])


def test_finetune_takes_the_weights_and_begins_at_step_0(words: list[str]) -> None:
    run = train_here(words)
    tuned = train_here([*words, "--load", str(run), "--finetune", "true"])
    assert steps(tuned)[0]["iteration"] == 1
    assert steps(tuned)[0]["loss"] < 0.9 * steps(run)[0]["loss"]


def test_medusa_2_may_begin_with_the_heads_of_medusa_1(words: list[str]) -> None:
    alone = without(words, "--medusa_objective")
    run = train_here([*alone, "--medusa_lr", "1e-2"])
    with pytest.raises(ConfigError, match="was trained with medusa1"):
        train_here([*words, *from_step(run)])
    joint = train_here([*words, *from_step(run), "--finetune", "true"])
    heads = [steps(each)[0]["loss_per_head"] for each in (run, joint)]
    assert sum(heads[1]) < 0.95 * sum(heads[0])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--medusa_num_heads", "3"], "has medusa_num_heads 2, this run 3"),
        (["--medusa_num_layers", "2"], "has medusa_num_layers 1, this run 2"),
        (["--original_lm_head", "false"], "has original_lm_head True, this run False"),
        (["--truncated_vocab_size", "50"], "has truncated_vocab_size None, this run 50"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_heads_of_another_make_are_refused(
    arguments: list[str], named: str, words: list[str]
) -> None:
    run = train_here(words)
    others = without(words, arguments[0]) if arguments[0] in words else words
    with pytest.raises(ConfigError, match=named) as caught:
        train_here([*others, *from_step(run), *arguments])
    assert "\n" not in str(caught.value)


def test_heads_of_another_width_are_refused(words: list[str], tmp_path: Path) -> None:
    from tests.tiny import reference, save

    run = train_here(words)
    wide = save(reference("llama", layers=3, hidden_size=64), tmp_path / "wide")
    with pytest.raises(ConfigError, match="has hidden_size 32, this run 64"):
        train_here([*without(words, "--model"), "--model", str(wide), *from_step(run)])


def test_a_missing_checkpoint_is_an_error_unless_one_may_be_missing(
    words: list[str], tmp_path: Path
) -> None:
    missing = ["--load", str(tmp_path / "nowhere")]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        train_here([*words, *missing])
    run = train_here([*words, *missing, "--exit_on_missing_checkpoint", "false"])
    assert steps(run)[0]["iteration"] == 1


def test_a_checkpoint_without_optimizer_state_has_to_be_asked_for(words: list[str]) -> None:
    run = train_here([*words, "--no_save_optim", "true"])
    with pytest.raises(CheckpointError, match="--no_load_optim true"):
        train_here([*words, *from_step(run)])
    rest = train_here([*words, *from_step(run), "--no_load_optim", "true"])
    assert steps(rest)[0]["loss"] == pytest.approx(steps(run)[STOP]["loss"], rel=1e-5)


def test_other_data_is_noticed(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    run = train_here(words)
    told = without(words, "--logging_level")
    train_here([*told, *from_step(run), "--system", "other"])
    assert "the data is not that of" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl+C", "SIGTERM"]
)
def test_a_signal_saves_and_the_run_can_be_resumed(
    number: signal.Signals,
    code: int,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = train_here(words)

    def tell(self: RunLog, step: Step) -> None:
        if step.iteration == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "step", tell)
        with pytest.raises(SystemExit) as caught:
            train_here(words)
    assert caught.value.code == code
    (stopped,) = (tmp_path / "runs").glob("v1-*")
    # The signal came after the ranks had agreed on step 2.
    assert (stopped / "latest_checkpointed_iteration.txt").read_text() == "3\n"
    rest = train_here([*words, "--load", str(stopped)])
    assert figures(rest) == pytest.approx(figures(whole)[-len(figures(rest)) :], rel=1e-5)


def test_before_the_first_step_a_signal_ends_the_run_at_once(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(self: HiddenCache, *arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was ignored")

    monkeypatch.setattr(HiddenCache, "fill", fill)
    more = ["--cache_hidden_states", str(tmp_path / "hidden")]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        train_here([*without(words, "--medusa_objective"), *more])
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoints(
    words: list[str], tmp_path: Path
) -> None:
    more = ["--medusa_lr", "1e30", "--clip_grad", "0", "--save_interval", "1"]
    with pytest.raises(EngineError, match="try a lower learning rate") as caught:
        train_here([*without(words, "--save_interval"), *more])
    told = re.match(r"step (\d+): the loss is (nan|inf)", str(caught.value))
    assert told is not None
    (run,) = (tmp_path / "runs").iterdir()
    assert find(run).name == f"iter_{int(told[1]) - 1:07}"
