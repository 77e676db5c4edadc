"""Hidden states on disk: the same training, without the base's forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import EngineError
from engine.training import hidden_cache
from engine.training.pipeline import Pipeline
from tests.engine.training.conftest import SmallDisk
from tests.engine.training.ranks import Ranks, records, steps, train_here
from tests.tiny import tiny_folder


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
        "--logging_level", "warning", "--train_iters", "4",
    ]
    # fmt: on


@pytest.fixture
def kept(tmp_path: Path) -> list[str]:
    return ["--cache_hidden_states", str(tmp_path / "hidden")]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of micro-batches of every pass through the base in this process."""
    counts: list[int] = []
    original = Pipeline.forward

    def counted(self: Pipeline, batches: Any, finish: Any) -> None:
        counts.append(len(batches))
        original(self, batches, finish)

    monkeypatch.setattr(Pipeline, "forward", counted)
    return counts


def figures(run: Path) -> list[float]:
    keys = ("loss", "eval_loss", "grad_norm")
    return [record[key] for record in records(run) for key in keys if key in record]


@pytest.mark.parametrize(("world", "stages"), [(1, 1), (2, 1), (4, 2)])
def test_the_losses_are_those_without_a_cache(
    world: int, stages: int, ranks: Ranks, words: list[str], kept: list[str]
) -> None:
    plain = train_here(words)
    cached = ranks.train(world, [*words, *kept, "--pipeline_model_parallel_size", str(stages)])
    # Hidden states are kept in float16.
    assert figures(cached) == pytest.approx(figures(plain), rel=2e-3)
    assert figures(cached) != figures(plain)


def test_the_base_runs_only_once_however_often_the_data_is_used(
    words: list[str], kept: list[str], forwards: list[int]
) -> None:
    first = train_here([*words, *kept])
    assert len(forwards) == 2  # training rows, and those held out
    second = train_here([*words, *kept])
    assert len(forwards) == 2
    assert figures(second) == figures(first)


def test_filling_goes_on_where_it_was_stopped(
    words: list[str],
    kept: list[str],
    tmp_path: Path,
    forwards: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hidden_cache, "SHARD_TOKENS", 40)
    whole = train_here([*words, *kept])
    shards = sorted((tmp_path / "hidden").rglob("shard_*"))
    assert len(shards) > 3
    shards[1].unlink()
    forwards.clear()
    assert figures(train_here([*words, *kept])) == figures(whole)
    assert len(forwards) == 1
    assert shards == sorted(path for path in (tmp_path / "hidden").rglob("*") if path.is_file())


def test_other_data_or_heads_never_meet_a_cache_that_is_not_theirs(
    words: list[str], kept: list[str], forwards: list[int]
) -> None:
    train_here([*words, *kept])
    for change in (["--system", "be brief"], ["--max_length", "30"], ["--medusa_lr", "1e-2"]):
        forwards.clear()
        train_here([*words, *kept, *change])
        assert bool(forwards) == (change[0] != "--medusa_lr")


def test_the_base_in_int8_is_near_and_its_states_are_kept_apart(
    words: list[str], kept: list[str], forwards: list[int]
) -> None:
    exact = train_here([*words, *kept])
    forwards.clear()
    found = train_here([*words, *kept, "--load_in_8bit", "true"])
    assert figures(found) == pytest.approx(figures(exact), rel=5e-2)
    assert figures(found) != figures(exact)
    assert not forwards
    assert figures(train_here([*words, *kept, "--load_in_8bit", "true"])) == figures(found)


def test_a_full_disk_is_named(
    words: list[str], kept: list[str], tmp_path: Path, small_disk: SmallDisk
) -> None:
    with (
        small_disk(hidden_cache.HiddenCache, "_write", 1_000),
        pytest.raises(EngineError, match="hidden states cannot be kept: File too large"),
    ):
        train_here([*words, *kept])
    assert not [path for path in (tmp_path / "hidden").rglob("*") if path.is_file()]


def test_true_keeps_them_in_jupiters_cache(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPITER_CACHE_DIR", str(tmp_path / "cache"))
    train_here([*words, "--cache_hidden_states", "true"])
    assert list((tmp_path / "cache" / "hidden").glob("llama-3-*/shard_00000.safetensors"))


def test_a_truncated_vocabulary_drops_rare_targets_and_still_counts_them_as_wrong(
    words: list[str], kept: list[str]
) -> None:
    full = train_here([*words, *kept])
    part = train_here([*words, *kept, "--truncated_vocab_size", "6"])
    first, second = steps(full)[0], steps(part)[0]
    assert first["dropped_targets"] == 0
    assert second["dropped_targets"] > 0
    assert second["loss"] < first["loss"]
    assert max(second["accuracy_per_head"]) < 1
    assert torch.tensor(second["accuracy_per_head"]).isfinite().all()
