"""Losses and gradients against transformers and plain autograd, for every process grid."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.model.config import ModelConfig
from engine.text import TextCodec
from engine.training.args import parse_arguments
from engine.training.args_resolve import with_model
from engine.training.checkpoint import find
from engine.training.data import load_samples, micro_batches
from engine.training.template import Sample
from tests.engine.training.ranks import Ranks, steps, tensors, without
from tests.tiny import reference, tiny_folder

HEADS, GLOBAL_BATCH = 3, 8
GRIDS = [(1, 1), (2, 1), (2, 2), (4, 2)]  # processes, pipeline stages


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
        "--model", str(tiny_folder(kind, 3)), "--dataset", str(dataset), "--save", str(folder),
        "--split_dataset_ratio", "0", "--eval_iters", "0", "--log_interval", "1",
        "--global_batch_size", str(GLOBAL_BATCH), "--medusa_num_heads", str(HEADS),
        "--logging_level", "warning", *more,
    ]
    # fmt: on


@dataclass
class Reference:
    """Base and heads in plain torch, one process, one sample at a time."""

    model: Any
    blocks: nn.ModuleList
    outputs: list[Tensor] | None
    weights: list[float]
    joint: bool

    @classmethod
    def new(cls, kind: str, *, own_outputs: bool, joint: bool) -> Reference:
        model = reference(kind, layers=3)
        blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(HEADS))
        for block in blocks:
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)
        outputs = None
        if own_outputs:
            copies = [model.lm_head.weight.detach().clone() for _ in range(HEADS)]
            outputs = [copy.requires_grad_(True) for copy in copies]
        return cls(model, blocks, outputs, [0.8**head for head in range(HEADS)], joint)

    def loss(self, batch: list[Sample]) -> Tensor:
        """Sum over the losses of weight times mean over all targets of the batch."""
        sums = [torch.zeros(()) for _ in range(HEADS + 1)]
        counts = [0] * (HEADS + 1)
        for sample in batch:
            tokens, counted = torch.from_numpy(sample.tokens), torch.from_numpy(sample.targets)
            hidden = self.model.model(tokens[None]).last_hidden_state[0]
            if not self.joint:
                hidden = hidden.detach()
            for ahead, logits in enumerate(self.logits(hidden), 1):
                for row in range(len(tokens) - ahead):
                    if counted[row + ahead]:
                        sums[ahead - 1] += F.cross_entropy(logits[row], tokens[row + ahead])
                        counts[ahead - 1] += 1
        self.each = [(s / n).item() if n else 0.0 for s, n in zip(sums, counts, strict=True)]
        base = sums[0] / counts[0] if self.joint else torch.zeros(())
        pairs = zip(self.weights, sums[1:], counts[1:], strict=True)
        return base + sum(w * s / n for w, s, n in pairs)

    def logits(self, hidden: Tensor) -> list[Tensor]:
        """Of the base, then of each head."""
        lm_head = self.model.lm_head.weight
        shared = lm_head if self.joint else lm_head.detach()
        found = [hidden @ shared.T]
        for head, block in enumerate(self.blocks):
            x = hidden + F.silu(block(hidden))
            found.append(x @ (shared if self.outputs is None else self.outputs[head]).T)
        return found

    def parameters(self) -> dict[str, Tensor]:
        """What learns, by its name in a checkpoint."""
        found: dict[str, Tensor] = dict(self.model.named_parameters()) if self.joint else {}
        for head, block in enumerate(self.blocks):
            found[f"medusa_head.{head}.0.linear.weight"] = block.weight
            found[f"medusa_head.{head}.0.linear.bias"] = block.bias
            if self.outputs is not None:
                found[f"medusa_head.{head}.1.weight"] = self.outputs[head]
        return found


def batches(args_words: list[str], count: int) -> list[list[Sample]]:
    """The first global batches of a run."""
    args = parse_arguments(args_words)
    folder = Path(args.model or "")
    config = ModelConfig.from_folder(folder)
    args = with_model(args, config, folder)
    codec = TextCodec(folder, folder / "tokenizer.json", config.eos_token_id)
    samples = load_samples(args, codec, "train")
    stream = micro_batches(samples, args=args, dp_rank=0, dp_size=1, consumed_samples=0)
    size = args.accumulation_steps(1)
    return [[s for _ in range(size) for s in next(stream)] for _ in range(count)]


CASES = [
    ("llama", "medusa1", False),  # tied embeddings
    ("llama", "medusa2", False),
    ("qwen2", "medusa2", True),
    ("linear_rope", "medusa1", True),
]


@pytest.mark.parametrize(("kind", "objective", "own_outputs"), CASES)
@pytest.mark.parametrize(("world", "stages"), GRIDS)
def test_the_first_gradient_equals_plain_autograd(
    kind: str,
    objective: str,
    own_outputs: bool,
    world: int,
    stages: int,
    ranks: Ranks,
    dataset: Path,
    tmp_path: Path,
) -> None:
    more = ["--pipeline_model_parallel_size", str(stages)]
    given = first_step(dataset, tmp_path, kind, objective, own_outputs, more)
    check_first_step(ranks.train(world, given), given, kind, objective, own_outputs)


@pytest.mark.parametrize(("kind", "objective"), [("llama", "medusa1"), ("qwen2", "medusa2")])
def test_heads_on_tensor_parallel_ranks_have_the_same_gradient(
    kind: str, objective: str, ranks: Ranks, dataset: Path, tmp_path: Path
) -> None:
    more = ["--tensor_model_parallel_size", "2", "--sequence_parallel", "true"]
    given = first_step(dataset, tmp_path, kind, objective, False, more)
    check_first_step(ranks.train(2, given), given, kind, objective, False)


def first_step(
    dataset: Path, folder: Path, kind: str, objective: str, own_outputs: bool, more: list[str]
) -> list[str]:
    """A run of one step; with SGD the momentum after it is the gradient itself."""
    # fmt: off
    return words(
        dataset, folder, kind, "--medusa_objective", objective, "--train_iters", "1",
        "--original_lm_head", str(not own_outputs).lower(), "--optimizer", "sgd",
        "--clip_grad", "0", "--weight_decay", "0", "--micro_batch_size", "2", *more,
    )
    # fmt: on


def check_first_step(
    run: Path, given: list[str], kind: str, objective: str, own_outputs: bool
) -> None:
    joint = objective == "medusa2"
    plain = Reference.new(kind, own_outputs=own_outputs, joint=joint)
    loss = plain.loss(batches(given, 1)[0])
    loss.backward()
    parameters = plain.parameters()
    found = tensors(run, "momentum_buffer", tiny_folder(kind, 3), parameters)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-5, msg=name)
    (step,) = steps(run)
    assert step["loss"] == pytest.approx(loss.item(), abs=1e-5, rel=1e-5)
    assert step["loss_per_head"] == pytest.approx(plain.each[1:], abs=1e-5, rel=1e-5)
    if joint:
        assert step["base_loss"] == pytest.approx(plain.each[0], abs=1e-5, rel=1e-5)
    norm = torch.cat([p.grad.flatten() for p in parameters.values()]).norm()
    assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize(("world", "stages"), GRIDS)
def test_steps_equal_a_plain_loop(
    world: int, stages: int, ranks: Ranks, dataset: Path, tmp_path: Path
) -> None:
    # fmt: off
    given = words(
        dataset, tmp_path, "llama", "--medusa_objective", "medusa2", "--train_iters", "4",
        "--medusa_warmup_iters", "1", "--medusa_lr", "1e-2", "--lr", "1e-3", "--min_lr", "1e-4",
        "--lr_decay_style", "linear", "--clip_grad", "0.5", "--weight_decay", "0.1",
        "--pipeline_model_parallel_size", str(stages),
    )
    # fmt: on
    run = ranks.train(world, given)
    plain = Reference.new("llama", own_outputs=False, joint=True)
    heads = {name: p for name, p in plain.parameters().items() if name.startswith("medusa_head")}
    base = {name: p for name, p in plain.parameters().items() if name not in heads}
    optimizers = [plain_optimizer(part.values()) for part in (heads, base)]
    for index, (step, batch) in enumerate(zip(steps(run), batches(given, 4), strict=True)):
        learning = [heads, base] if index else [heads]
        for parameter in plain.parameters().values():
            parameter.grad = None
        plain.loss(batch).backward()
        loss = plain.each[0] + sum(
            w * each for w, each in zip(plain.weights, plain.each[1:], strict=True)
        )
        assert step["loss"] == pytest.approx(loss, abs=1e-5, rel=1e-5)
        every = [p for part in learning for p in part.values()]
        norm = torch.nn.utils.clip_grad_norm_(every, 0.5)
        assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        rates = (1e-2 - 9e-3 * index / 4, 1e-3 - 9e-4 * (index - 1) / 3)
        assert step["learning_rate"] == pytest.approx(rates[0])
        for optimizer, rate, part in zip(optimizers, rates, (heads, base), strict=True):
            if part in learning:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()


def plain_optimizer(parameters: Any) -> torch.optim.Optimizer:
    every = list(parameters)
    groups = [
        {"params": [p for p in every if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in every if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)


def test_a_tied_embedding_at_both_ends_learns_as_one(
    ranks: Ranks, dataset: Path, tmp_path: Path
) -> None:
    # fmt: off
    given = words(
        dataset, tmp_path, "llama", "--medusa_objective", "medusa2", "--train_iters", "3",
        "--pipeline_model_parallel_size", "2", "--lr", "1e-2",
    )
    # fmt: on
    # Were lm_head and embedding not one, the losses would soon leave those of a single process.
    one, four = (
        ranks.train(1, without(given, "--pipeline_model_parallel_size")),
        ranks.train(4, given),
    )
    losses = [[step["loss"] for step in steps(run)] for run in (one, four)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_replicas_that_do_not_share_the_optimizer_come_to_the_same(
    ranks: Ranks, dataset: Path, tmp_path: Path
) -> None:
    given = words(dataset, tmp_path, "llama", "--medusa_objective", "medusa2", "--train_iters", "3")
    plain = ["--use_distributed_optimizer", "false"]
    one, two = ranks.train(1, given), ranks.train(2, [*given, *plain])
    losses = [[step["loss"] for step in steps(run)] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # Stored once all the same.
    sizes = [sum(f.stat().st_size for f in find(run).glob("rank_*")) for run in (one, two)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)
