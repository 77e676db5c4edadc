"""`jupiter sft` and `pt` against transformers and plain autograd, for every kind of parallelism.

The ranks are processes that are used again and again; tests/e2e/test_sft.py has the same under
torchrun. `--full` runs all cases, else a seeded sample of them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.model.config import ModelConfig
from engine.text import TextCodec
from engine.training.args import Command, parse_arguments
from engine.training.args_resolve import with_model
from engine.training.data import load_samples, micro_batches
from engine.training.template import Sample
from tests.engine.training.ranks import Ranks, steps, tensors
from tests.tiny import reference, tiny_folder

LAYERS = 4
TP2 = ["--tensor_model_parallel_size", "2"]
PP2 = ["--pipeline_model_parallel_size", "2"]
CP2 = ["--context_parallel_size", "2"]
SP = ["--sequence_parallel", "true"]
FULL = ["--recompute_granularity", "full", "--recompute_method"]
# Ranks and what they share.
GRIDS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tp2": (2, TP2),
    "tp2 sp": (2, [*TP2, *SP]),
    "pp2 gpipe": (2, [*PP2, "--pipeline_schedule", "gpipe"]),
    "pp2 1f1b": (2, PP2),
    "pp2 interleaved": (2, [*PP2, "--pipeline_schedule", "interleaved"]),
    "cp2": (2, CP2),
    "dp2": (2, []),
    "dp2 whole": (2, ["--use_distributed_optimizer", "false"]),
    "dp2 overlap": (2, ["--overlap_grad_reduce", "true", "--overlap_param_gather", "true"]),
    "pp2 tp2": (4, [*PP2, *TP2]),
    "pp2 dp2": (4, PP2),
    "tp2 dp2": (4, [*TP2, "--overlap_grad_reduce", "true"]),
    "tp2 sp cp2": (4, [*TP2, *SP, *CP2]),
    "pp2 cp2": (4, [*PP2, *CP2]),
    "pp2 tp2 sp interleaved": (4, [*PP2, *TP2, *SP, "--pipeline_schedule", "interleaved"]),
}
RECOMPUTE = {
    "selective": ["--recompute_granularity", "selective"],
    "uniform": [*FULL, "uniform", "--recompute_num_layers", "2"],
    "block": [*FULL, "block", "--recompute_num_layers", "1"],
}
# Tied, untied, and untied with biases.
KINDS = ("llama", "mistral", "qwen2", "linear_rope")
PACKED = (False, True)


def cases() -> list[tuple[str, str, str, bool, Command]]:
    """Every grid with every way of recomputing, model and packing; `pt` where nothing is said."""
    found: list[tuple[str, str, str, bool, Command]] = []
    for grid in GRIDS:
        for number, recompute in enumerate(RECOMPUTE):
            for kind in KINDS:
                packed = PACKED[(number + KINDS.index(kind)) % 2]
                found.append((grid, recompute, kind, packed, "pt" if number == 2 else "sft"))
    return found


def sample() -> list[tuple[str, str, str, bool, Command]]:
    """A seeded sample: most grids, each in one of its cases."""
    dice = random.Random(8)
    grids = sorted(dice.sample(list(GRIDS), 10), key=list(GRIDS).index)
    return [dice.choice([case for case in cases() if case[0] == grid]) for grid in grids]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        metafunc.parametrize("case", cases() if full else sample(), ids=str)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of very different lengths, so that means of means would be seen."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lengths = (1, 30, 2, 17, 5, 40, 3, 9, 22, 1, 12)
    rows = [
        {
            "query": "ask" * (n % 3 + 1),
            "response": "".join(chr(97 + (i * n) % 23) for i in range(n)),
        }
        for n in lengths
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(dataset: Path, folder: Path, kind: str, *more: str) -> list[str]:
    # fmt: off
    return [
        "--model", str(tiny_folder(kind, LAYERS)), "--dataset", str(dataset),
        "--save", str(folder), "--split_dataset_ratio", "0", "--eval_iters", "0",
        "--log_interval", "1", "--global_batch_size", "8", "--micro_batch_size", "2",
        "--logging_level", "warning", "--train_iters", "1", "--optimizer", "sgd",
        "--clip_grad", "0", "--weight_decay", "0", *more,
    ]
    # fmt: on


def first_batch(given: list[str], command: Command) -> list[Sample]:
    """The rows of the first step."""
    args = parse_arguments(given, command)
    folder = Path(args.model or "")
    config = ModelConfig.from_folder(folder)
    args = with_model(args, config, folder)
    codec = TextCodec(folder, folder / "tokenizer.json", config.eos_token_id)
    samples = load_samples(args, codec, "train")
    stream = micro_batches(samples, args=args, dp_rank=0, dp_size=1, consumed_samples=0)
    return [row for _ in range(args.accumulation_steps(1)) for row in next(stream)]


def plain_loss(model: Any, batch: list[Sample]) -> Tensor:
    """Mean cross entropy over the targets of all rows, one row at a time."""
    total, count = torch.zeros(()), 0
    for row in batch:
        tokens = torch.from_numpy(row.tokens)
        logits = model(tokens[None]).logits[0, :-1]
        counted = torch.from_numpy(row.targets[1:])
        total = total + F.cross_entropy(logits[counted], tokens[1:][counted], reduction="sum")
        count += int(counted.sum())
    return total / count


def test_loss_and_gradient_equal_plain_autograd(
    case: tuple[str, str, str, bool, Command], ranks: Ranks, dataset: Path, tmp_path: Path
) -> None:
    world, given, command = command_line(case, dataset, tmp_path)
    check(ranks.train(world, given, command), given, case)


def command_line(
    case: tuple[str, str, str, bool, Command], dataset: Path, folder: Path
) -> tuple[int, list[str], Command]:
    """Ranks, words and command of a case."""
    grid, recompute, kind, packed, command = case
    world, shares = GRIDS[grid]
    packing = ["--packing", str(packed).lower(), "--max_length", "64"]
    return world, words(dataset, folder, kind, *shares, *RECOMPUTE[recompute], *packing), command


def check(run: Path, given: list[str], case: tuple[str, str, str, bool, Command]) -> None:
    """Whether the first step of `run` had the loss and gradient of a plain model."""
    _, _, kind, _, command = case
    model = reference(kind, layers=LAYERS)
    loss = plain_loss(model, first_batch(given, command))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    # With SGD the momentum after the first step is the gradient itself.
    found = tensors(run, "momentum_buffer", tiny_folder(kind, LAYERS), gradients)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            found[name], gradient, atol=1e-4 * scale, rtol=1e-4, msg=f"{case}: {name}"
        )
    (step,) = steps(run)
    assert step["loss"] == pytest.approx(loss.item(), abs=1e-5, rel=1e-5)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    # The weights moved by the gradient alone, on whichever ranks they are.
    weights = tensors(run, "", tiny_folder(kind, LAYERS), gradients)
    for name, parameter in model.named_parameters():
        moved = parameter.detach() - 1e-5 * gradients[name]
        torch.testing.assert_close(weights[name], moved, atol=1e-6, rtol=1e-5)
