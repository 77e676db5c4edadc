"""The compiled kernels against the modules, on tiny random weights."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.build import NoKernelsError, load_kernels
from engine.kernels.forward import NativeForward
from engine.model.quantize import quantize_model
from engine.pipeline.batch import Entry, Judge
from engine.pipeline.stage import Stage
from tests.engine.test_model import chain, run_all, stages_of
from tests.tiny import reference

try:
    load_kernels()
except NoKernelsError as error:
    pytest.skip(f"no kernels on this machine: {error}", allow_module_level=True)

SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}


def stages(kind: str, *, native: bool, threads: int = 2) -> list[Stage]:
    found = stages_of(reference(kind, **SIZES), [3, 3])
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
    native, modules = stages(kind, native=True), stages(kind, native=False)
    for entries in steps():
        got, expected = run_all(native, entries), run_all(modules, entries)
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)


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
