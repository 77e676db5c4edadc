"""The compiled kernels against the modules, on tiny random weights."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.arena import Arena
from engine.kernels.build import NoKernelsError, load_kernels
from engine.kernels.forward import NativeForward
from engine.kernels.native import Kernels, pack
from engine.model.quantize import quantize_linear, quantize_model
from engine.pipeline.batch import Entry, Judge
from engine.pipeline.stage import Stage
from tests.engine.test_model import chain, run_all, stages_of
from tests.tiny import reference

try:
    load_kernels()
except NoKernelsError as error:
    pytest.skip(f"no kernels on this machine: {error}", allow_module_level=True)

SIZES = {"hidden_size": 64, "head_dim": 16}


def stages(kind: str, *, native: bool, threads: int = 2, layers: int = 6) -> list[Stage]:
    split = [layers // 2, layers // 2] if layers > 1 else [1]
    found = stages_of(reference(kind, layers=layers, **SIZES), split)
    for stage in found:
        quantize_model(stage.model, 8, stage.device)
        if native:
            stage.forward = NativeForward(stage.model, threads)
    return found


def steps() -> list[list[Entry]]:
    """A prompt of two chunks, a tree, and another sequence that joins in another cache."""
    tree = [-1, 0, 0, 1, 3, 2]
    return [
        [chain(0, 0, list(range(3, 40)))],
        [chain(0, 37, [5, 7, 9]), chain(3, 0, [4, 4, 8, 1])],
        [
            Entry(0, 40, [1, 2, 3, 4, 5, 6], tree, Judge.TREE),
            Entry(3, 4, [9, 8, 7, 6, 5, 4], tree, Judge.TREE),
        ],
    ]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_kernels_compute_what_the_modules_do(kind: str) -> None:
    native, modules = (stages(kind, native=n) for n in (True, False))
    for entries in steps():
        got, expected = run_all(native, entries), run_all(modules, entries)
        # A sum that ends a bit lower may be rounded to another integer; little comes of it.
        assert (got - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_where_nothing_is_rounded_otherwise_kernels_are_as_exact_as_floats(kind: str) -> None:
    native, modules = (stages(kind, native=n, layers=1) for n in (True, False))
    for entries in steps():
        got, expected = run_all(native, entries), run_all(modules, entries)
        off = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert off.median() < 1e-5


@pytest.mark.parametrize("width", [16, 32, 48, 64, 576])
def test_kernels_turn_and_round_inputs_as_the_module_does(width: int) -> None:
    torch.manual_seed(0)
    x, module = torch.randn(5, width), quantize_linear(torch.nn.Linear(width, 40))
    x[:, 3] *= 100
    packed = pack(module.weight, module.scale, module.bias, module.block, arena=Arena())
    got = Kernels(2).linear(packed, x)[:, :40]
    torch.testing.assert_close(got, module(x), atol=1e-5, rtol=1e-5)
    tokens = torch.tensor([0, 39, 17])
    assert torch.equal(packed.rows(tokens), module.rows(tokens))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_is_the_same_to_the_bit_whatever_stands_beside_it(threads: int) -> None:
    together, alone = (stages("llama", native=True, threads=n) for n in (threads, 2))
    for entries in steps()[:2]:
        run_all(together, entries)
        for entry in entries:
            run_all(alone, [entry])
    entries = steps()[2]
    got = run_all(together, entries)
    for index, entry in enumerate(entries):
        # One node at a time: the line of ancestors as a chain of single steps.
        for node, line in ((1, [0, 1]), (4, [0, 1, 3, 4]), (5, [0, 2, 5])):
            tokens = [entry.tokens[n] for n in line]
            for step, token in enumerate(tokens):
                out = run_all(
                    alone, [Entry(entry.slot, entry.start + step, [token], [-1], Judge.TREE)]
                )
            assert torch.equal(out[0], got[6 * index + node])


def test_a_row_is_the_same_to_the_bit_whatever_the_memory_held_before() -> None:
    (stage, *_) = stages("llama", native=True)
    assert isinstance(stage.forward, NativeForward)
    entry = chain(0, 24, list(range(3, 16)))
    stage.run([chain(0, 0, list(range(3, 27)))], None)
    found = []
    for rubbish in (0.0, 1e30, float("nan")):
        layers = stage.forward._layers
        layers.scratch = torch.full_like(layers.scratch, rubbish)
        found.append(stage.run([entry], None))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_threads_that_come_and_go_change_nothing() -> None:
    kernels = Kernels(3)
    torch.manual_seed(0)
    weight, scale = torch.randint(-127, 128, (96, 64), dtype=torch.int8), torch.rand(96)
    product = pack(weight, scale, arena=Arena())
    x = torch.randn(7, 64)
    expected = kernels.linear(product, x)
    for threads in (1, 3, 2, 1, 1, 3, 9) * 20:
        kernels.use(threads)
        assert torch.equal(kernels.linear(product, x), expected)
