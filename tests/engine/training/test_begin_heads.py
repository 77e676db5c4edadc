"""Training that begins with trained heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoint.heads import write_heads
from engine.errors import ConfigError
from engine.model.config import ModelConfig
from engine.model.medusa import HeadShape, MedusaLlamaForCausalLM
from engine.training.begin_heads import begin_heads, go_on_from
from tests.tiny import tiny_folder


def model(shape: HeadShape) -> MedusaLlamaForCausalLM:
    torch.manual_seed(2)
    found = MedusaLlamaForCausalLM(ModelConfig.from_folder(tiny_folder("llama", 3)), shape)
    assert isinstance(found.lm_head, torch.nn.Linear)
    begin_heads(found.medusa_head, shape, found.lm_head)
    return found


def trained(folder: Path, shape: HeadShape) -> MedusaLlamaForCausalLM:
    """Heads of three, of which the second half of the inner units does nearly nothing."""
    found = model(shape)
    for name, parameter in found.medusa_head.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if name.endswith("fc2.weight"):
            parameter.data[:, 12:] *= 1e-6
    parts = {f"medusa_head.{n}": t for n, t in found.medusa_head.state_dict().items()}
    write_heads(folder, parts, "jupiter")
    return found


@pytest.mark.parametrize("inner", [12, 24, 40])
@pytest.mark.parametrize("kind", ["root", "hydra"])
@torch.no_grad()
def test_other_heads_begin_with_what_was_learnt(tmp_path: Path, inner: int, kind: str) -> None:
    before = trained(tmp_path, HeadShape(3, 2, kind="root", inner_size=24))
    shape = HeadShape(4, 2, kind=kind, inner_size=inner)  # type: ignore[arg-type]
    after = model(shape)
    go_on_from(after.medusa_head, shape, tmp_path)
    hidden, known = torch.randn(5, 32), torch.randint(260, (5, 4))
    for head in range(3):
        torch.testing.assert_close(
            after.head_hidden(head, hidden, known),
            before.head_hidden(head, hidden, known),
            atol=1e-4,
            rtol=1e-4,
        )
    torch.testing.assert_close(after.head_hidden(3, hidden, known), hidden)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (HeadShape(3, 2), "resblock heads cannot go on from hydra heads"),
        (HeadShape(3, 2, kind="root", inner_size=24), "root heads cannot go on from hydra"),
        (HeadShape(3, 1, kind="hydra", inner_size=24), "its heads have 2 blocks, medusa_num_layer"),
        (HeadShape(3, 2, 260, kind="hydra", inner_size=24), "other output layers than original_lm"),
    ],
)
def test_heads_that_do_not_fit_are_refused(tmp_path: Path, shape: HeadShape, message: str) -> None:
    trained(tmp_path, HeadShape(3, 2, kind="hydra", inner_size=24))
    with pytest.raises(ConfigError, match=f"--medusa_head_path .*: .*{message}"):
        go_on_from(model(shape).medusa_head, shape, tmp_path)
