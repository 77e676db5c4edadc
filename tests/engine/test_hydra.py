"""Sequential heads: what they draft depends on what was drafted before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoint.heads import write_heads
from engine.config import parse_config
from engine.decoding.drafted import Drafted
from engine.decoding.tree import MC_63, ROOT_ONLY, build_tree, with_chain
from engine.decoding.tuner import FixedTree, TreeTuner
from engine.model.config import ModelConfig
from engine.model.medusa import HeadShape, MedusaLlamaForCausalLM
from engine.pipeline.batch import Entry, Judge, decode_batch, encode_batch
from engine.pipeline.build import build_stage, make_plan
from engine.pipeline.stage import Stage
from tests.tiny import reference, save, tiny_folder

HEADS = 3
TREE = build_tree([p for p in MC_63[:24] if len(p) <= HEADS], HEADS)
CPU = torch.device("cpu")


def hydra(folder: Path, *, own: bool) -> MedusaLlamaForCausalLM:
    torch.manual_seed(3)
    shape = HeadShape(HEADS, 2, 260 if own else None, kind="hydra", inner_size=32)
    model = MedusaLlamaForCausalLM(ModelConfig.from_folder(folder), shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def expected(model: MedusaLlamaForCausalLM, hidden: torch.Tensor, tokens: list[int]) -> list[int]:
    """The likeliest tokens behind these, from the modules, one node at a time."""
    head = model.medusa_head[len(tokens) - 1]
    seen = model.model.embed_tokens(torch.tensor(tokens))
    parts = [torch.nn.functional.rms_norm(x, (32,), eps=1e-6) for x in (hidden, *seen)]
    x = hidden + head[0].fc2(head[0].act(head[0].fc1(torch.cat(parts))))  # type: ignore[index]
    x = head[1](x)  # type: ignore[index]
    output = head[2] if model.heads.vocab_size else model.lm_head  # type: ignore[index]
    return output(x).topk(TREE.width).indices.tolist()


@pytest.mark.parametrize("own", [False, True])
def test_every_node_has_the_candidates_that_follow_from_its_own_path(own: bool) -> None:
    model = hydra(tiny_folder("qwen2", 3), own=own)
    hidden, roots = torch.randn(2, 32), torch.tensor([7, 201])
    lists = model.draft(hidden, roots, TREE.width, tree=TREE).tolist()
    for row, root in enumerate(roots.tolist()):
        drafted = Drafted(lists[row], TREE)
        tokens = drafted.tokens(TREE, root)
        assert len(lists[row]) == len(TREE.inner)
        places = {path: node for node, path in enumerate([(), *TREE.paths])}
        for path in TREE.inner_places:
            line = [tokens[places[path[:end]]] for end in range(len(path) + 1)]
            assert drafted.behind(path) == expected(model, hidden[row], line)


def test_only_what_was_drafted_for_is_tried() -> None:
    small = build_tree([(0,), (0, 0), (1,)], HEADS)  # drafted at the root and at (0,)
    drafted = Drafted([[5, 6, 7], [8, 9, 4]], small)
    assert drafted.cut(small) is small
    large = build_tree([(0,), (1,), (2,), (3,), (0, 0), (0, 1), (1, 0), (0, 0, 0)], HEADS)
    assert drafted.cut(large).paths == ((0,), (1,), (2,), (0, 0), (0, 1))
    assert drafted.tokens(drafted.cut(large), 1) == [1, 5, 6, 7, 8, 9]
    assert Drafted([], None).cut(large) == Drafted([], small).cut(large) == ROOT_ONLY
    assert drafted.behind((1,)) == ()


def test_the_tuner_names_the_tree_of_the_next_step_to_draft_along() -> None:
    tuner = TreeTuner(HEADS, sequential=True)
    tuner.begin({1: 0.010, 64: 0.030}, undrafted=0.0095)
    tried = []
    for _ in range(200):
        along = tuner.along
        if tuner.heads == HEADS:
            assert along is not None and with_chain(along, HEADS) == along
        tree = tuner.step(1)
        drafted = Drafted([list(range(10))] * len(along.inner), along) if along else Drafted()
        tried.append(drafted.cut(tree).size == tree.size)
    # But for the steps behind a change of mind.
    assert sum(tried) > 190
    assert TreeTuner(HEADS).along is None
    assert FixedTree(TREE).along is None
    assert FixedTree(TREE, sequential=True).along is TREE


def test_the_tree_to_draft_along_travels_with_the_entry() -> None:
    for tree in (TREE, None):
        entry = Entry(0, 4, [1], [-1], Judge.TREE, draft_width=5, draft_tree=tree)
        assert decode_batch(encode_batch([entry])) == [entry]


def build(folder: Path, heads: Path, **values: object) -> Stage:
    config = {
        "base_model_name_or_path": str(folder),
        "stage_num_hidden_layers_list": [3],
        "medusa_head_path": str(heads),
        "device": "cpu",
        **values,
    }
    return build_stage(make_plan(parse_config(config, "a test"), folder), 0, CPU, lambda *_: None)


def test_int8_kernels_draft_nearly_what_the_modules_do(tmp_path: Path) -> None:
    # Heads of 16 elements, which the kernels are compiled for.
    folder = save(reference("llama", layers=3, hidden_size=64), tmp_path / "model")
    parts = {
        f"medusa_head.{name}": tensor
        for name, tensor in hydra(folder, own=True).medusa_head.state_dict().items()
    }
    write_heads(tmp_path / "heads", parts, "jupiter")
    exact, fast = (build(folder, tmp_path / "heads", load_in_8bit=int8) for int8 in (False, True))
    assert fast.forward.by_row
    hidden, roots = torch.randn(8, 64), torch.arange(40, 48)
    found = [stage.forward.draft(hidden, roots, TREE.width, tree=TREE) for stage in (exact, fast)]
    known = torch.stack([roots, found[1][:, 0, 0]], dim=1)[:, None]
    assert torch.equal(found[1][:, 1:2], fast.forward.guess(1, hidden, known, TREE.width))
    # Of the candidates at the root; deeper ones follow from paths that may differ.
    assert (found[0][:, 0, 0] == found[1][:, 0, 0]).float().mean() > 0.7
    assert fast.forward.draft(hidden, roots, 4, 2).shape == (8, 2, 4)  # one path, two heads
