"""Flat buffers and the optimizer against torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

from engine.training.flat import FlatBuffer
from engine.training.mesh import Group
from engine.training.optimizer import Optimizer, OptimizerOptions, Role, global_norm

ALONE = Group((0,), 0, None)
SHAPES = {"layer.weight": (3, 4), "norm.weight": (4,), "medusa_head.0.0.linear.weight": (4, 4)}
RATES = {Role.BASE: 0.01, Role.HEADS: 0.1}


def made() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def loss_of(parameters: dict[str, nn.Parameter], step: int) -> torch.Tensor:
    return sum((p * torch.sin(p + step)).sum() for p in parameters.values())


def torch_adam(groups: list[dict], options: OptimizerOptions) -> torch.optim.Optimizer:
    betas = (options.adam_beta1, options.adam_beta2)
    return torch.optim.AdamW(groups, betas=betas, eps=options.adam_eps)


def torch_sgd(groups: list[dict], options: OptimizerOptions) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=options.sgd_momentum)


@pytest.mark.parametrize(("kind", "make"), [("adam", torch_adam), ("sgd", torch_sgd)])
def test_updates_equal_torchs_with_clipping_and_decay_of_matrices_only(
    kind: str, make: Callable[..., torch.optim.Optimizer]
) -> None:
    options = OptimizerOptions(optimizer=kind, weight_decay=0.3, clip_grad=2.0)  # type: ignore[arg-type]
    ours, theirs = made(), made()
    optimizer = Optimizer([FlatBuffer(ours, ALONE, sharded=True)], options)
    groups = [
        {
            "params": [parameter],
            "lr": RATES[Role.HEADS if "head" in name else Role.BASE],
            "weight_decay": 0.3 if parameter.dim() > 1 else 0.0,
        }
        for name, parameter in theirs.items()
    ]
    reference = make(groups, options)
    for step in range(4):
        optimizer.zero_grads()
        loss_of(ours, step).backward()
        norm = global_norm(optimizer.reduce(frozenset(Role)), ALONE)
        optimizer.step(RATES, norm)
        reference.zero_grad()
        loss_of(theirs, step).backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), 2.0)
        assert norm == pytest.approx(expected.item(), rel=1e-5)
        reference.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)


def test_a_role_that_does_not_learn_stays_and_its_gradient_does_not_count() -> None:
    parameters = made()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = Optimizer([FlatBuffer(parameters, ALONE, sharded=True)], OptimizerOptions())
    loss_of(parameters, 0).backward()
    norm = global_norm(optimizer.reduce(frozenset({Role.HEADS})), ALONE)
    head = parameters["medusa_head.0.0.linear.weight"]
    assert head.grad is not None
    assert norm == pytest.approx(head.grad.norm().item(), rel=1e-5)
    optimizer.step({Role.HEADS: 0.1}, norm)
    assert not head.equal(before["medusa_head.0.0.linear.weight"])
    for name in ("layer.weight", "norm.weight"):
        assert parameters[name].equal(before[name])
    assert optimizer.updates == {Role.BASE: 0, Role.HEADS: 1}


def test_gradients_add_up_until_they_are_zeroed() -> None:
    parameters = made()
    buffer = FlatBuffer(parameters, ALONE, sharded=True)
    loss_of(parameters, 0).backward()
    once = buffer.grads.clone()
    loss_of(parameters, 0).backward()
    torch.testing.assert_close(buffer.grads, 2 * once)
    buffer.zero_grads()
    assert not any(p.grad.any() for p in parameters.values())


def test_shards_cover_every_element_once() -> None:
    class Silent(Group):
        def __init__(self, index: int) -> None:
            self.size, self.index = 4, index

    pieces = [
        piece
        for index in range(4)
        for piece in FlatBuffer(made(), Silent(index), sharded=True).pieces
    ]
    for name, shape in SHAPES.items():
        spans = sorted((p.start, p.start + p.value.numel()) for p in pieces if p.name == name)
        assert spans[0][0] == 0
        assert spans[-1][1] == torch.Size(shape).numel()
        assert all(a[1] == b[0] for a, b in pairwise(spans))
