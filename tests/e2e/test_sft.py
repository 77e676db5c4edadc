"""`jupiter sft` and `pt` under torchrun, against plain autograd; `--full` runs all cases."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.training.args import Command
from tests.engine.training.test_sft_reference import (
    RECOMPUTE,
    cases,
    check,
    command_line,
    dataset,
)

__all__ = ["dataset"]  # a fixture

Case = tuple[str, str, str, bool, Command]
FEW: list[Case] = [
    ("pp2 tp2 sp interleaved", "uniform", "qwen2", True, "sft"),
    ("cp2", "selective", "llama", False, "pt"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        metafunc.parametrize("case", cases()[:: len(RECOMPUTE)] if full else FEW, ids=str)


def start(command: str, ranks: int, words: list[str], folder: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the shipped command."""
    environment = {
        **os.environ,
        "NPROC_PER_NODE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "XDG_RUNTIME_DIR": str(folder),
    }
    done = subprocess.run(
        [sys.executable, "-m", "engine.cli.main", command, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_has_loss_and_gradient_of_a_plain_model(
    case: Case, dataset: Path, tmp_path: Path
) -> None:
    ranks, words, command = command_line(case, dataset, tmp_path / "runs")
    code, out, err = start(command, ranks, words, tmp_path)
    assert code == 0, err
    check(Path(out.splitlines()[-1]), words, case)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tensor_model_parallel_size 3", "does not divide the model's 4 attention heads"),
        ("--medusa_lr 1e-3", "--medusa_lr: belongs to jupiter medusa; jupiter sft trains no heads"),
        ("--ckpt_format zarr", "--ckpt_format zarr: Megatron-Core itself has given this format up"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: str, message: str, dataset: Path, tmp_path: Path
) -> None:
    case: Case = ("one", "selective", "llama", False, "sft")
    _, given, _ = command_line(case, dataset, tmp_path / "runs")
    ranks = 3 if words.startswith("--tensor") else 1
    batch = given.index("--global_batch_size") + 1
    given[batch] = "6"
    code, out, err = start("sft", ranks, [*given, *words.split()], tmp_path)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
