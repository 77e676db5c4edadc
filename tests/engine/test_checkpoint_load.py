"""A stage gets exactly its own tensors, from the base model and from the heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.head_layouts import part_shapes
from engine.checkpoint.heads import inspect_heads, read_heads, write_heads
from engine.checkpoint.load import load_weights
from engine.checkpoint.merge import merge
from engine.errors import CheckpointError
from engine.model.config import ModelConfig
from engine.model.head_kinds import HeadKind, tokens_seen
from engine.model.medusa import NO_HEADS, HeadShape, MedusaLlamaForCausalLM
from tests.tiny import KINDS, reference, save, tiny_folder

CPU = torch.device("cpu")
WIDTH, VOCAB = 32, 260


def random_heads(count: int = 2, *, shared: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    tensors = {}
    for head in range(count):
        tensors[f"medusa_head.{head}.0.linear.weight"] = torch.randn(WIDTH, WIDTH)
        tensors[f"medusa_head.{head}.0.linear.bias"] = torch.randn(WIDTH)
        if not shared:
            tensors[f"medusa_head.{head}.1.weight"] = torch.randn(VOCAB, WIDTH)
    return tensors


def stage(
    folder: Path,
    heads: HeadShape = NO_HEADS,
    *,
    layers: range | None = None,
    first: bool = True,
    last: bool = True,
) -> MedusaLlamaForCausalLM:
    """A stage on the meta device, before its weights are loaded."""
    config = ModelConfig.from_folder(folder)
    with torch.device("meta"):
        return MedusaLlamaForCausalLM(config, heads, layers=layers, first=first, last=last)


def load(
    model: MedusaLlamaForCausalLM, folder: Path, heads: Path | None = None
) -> MedusaLlamaForCausalLM:
    load_weights(model, folder, heads, dtype=torch.float32, device=CPU)
    return model


@pytest.mark.parametrize("kind", [*KINDS])
def test_the_stages_together_hold_the_model(kind: str) -> None:
    folder = tiny_folder(kind, 3)
    expected = reference(kind, layers=3).state_dict()
    splits = [range(1), range(1, 2), range(2, 3)]
    seen: set[str] = set()
    for layers in splits:
        first, last = layers.start == 0, layers.stop == 3
        model = load(stage(folder, layers=layers, first=first, last=last), folder)
        state = model.state_dict()
        assert all(not parameter.is_meta for parameter in model.parameters())
        for name, tensor in state.items():
            assert torch.equal(tensor, expected[name]), name
        seen |= state.keys()
    assert seen == expected.keys()


def test_tied_weights_are_one_tensor_on_a_single_stage_and_a_copy_on_the_last(
    tmp_path: Path,
) -> None:
    folder = tiny_folder("llama", 3)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load(stage(folder), folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    last = load(stage(folder, layers=range(2, 3), first=False), folder)
    assert torch.equal(last.lm_head.weight, model.model.embed_tokens.weight)


def test_weights_are_converted_and_progress_is_told() -> None:
    folder = tiny_folder("qwen2", 3)
    model = stage(folder)
    steps: list[tuple[int, int]] = []
    load_weights(
        model,
        folder,
        None,
        dtype=torch.bfloat16,
        device=CPU,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    total = len(model.state_dict())
    assert steps == [(done, total) for done in range(1, total + 1)]


def test_only_the_files_of_the_stage_are_read(tmp_path: Path) -> None:
    folder = save(reference("mistral", layers=2), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    save_file(own, folder / "own.safetensors")
    (folder / "other.safetensors").write_bytes(b"torn")
    weight_map = {
        name: "own.safetensors" if name in own else "other.safetensors" for name in tensors
    }
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    load(stage(folder, layers=range(1), first=False, last=False), folder)
    with pytest.raises(CheckpointError, match=r"other\.safetensors: cut short"):
        load(stage(folder, layers=range(1, 2), first=False, last=False), folder)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = save(reference("mistral", layers=2), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    load(stage(folder, layers=range(1), last=False), folder)
    with pytest.raises(CheckpointError) as caught:
        load(stage(folder), folder)
    assert str(caught.value) == f"{folder}: tensor model.layers.1.mlp.up_proj.weight is missing"


def test_another_shape_is_named_with_both(tmp_path: Path) -> None:
    folder = save(reference("mistral", layers=2), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(stage(folder), folder)
    file = folder / "model.safetensors"
    assert str(caught.value) == (
        f"{file}: tensor model.norm.weight is [31], but the model needs [32]"
    )


def test_heads_come_from_their_own_checkpoint(tmp_path: Path) -> None:
    folder = tiny_folder("qwen2", 3)
    heads = random_heads(3)
    write_heads(tmp_path, heads)
    model = load(stage(folder, HeadShape(2, 1, VOCAB)), folder, tmp_path)
    state = model.state_dict()
    mine = {name for name in state if name.startswith("medusa_head.")}
    assert mine == {name for name in heads if not name.startswith("medusa_head.2.")}
    assert all(torch.equal(state[name], heads[name]) for name in mine)
    with pytest.raises(CheckpointError, match=r"medusa_head\.3\.0\.linear\.weight is missing"):
        load(stage(folder, HeadShape(4, 1, VOCAB)), folder, tmp_path)


def test_heads_of_another_width_are_refused(tmp_path: Path) -> None:
    folder = tiny_folder("qwen2", 3)
    write_heads(tmp_path, {"medusa_head.0.0.weight": torch.zeros(VOCAB, 16)})
    with pytest.raises(CheckpointError, match=r"is \[260, 16\], but the model needs \[260, 32\]"):
        load(stage(folder, HeadShape(1, 0, VOCAB)), folder, tmp_path)


@pytest.mark.parametrize("right", [True, False])
def test_a_copy_of_lm_head_with_the_heads_must_be_the_models(tmp_path: Path, right: bool) -> None:
    folder = tiny_folder("qwen2", 3)
    lm_head = reference("qwen2", layers=3).lm_head.weight.detach()
    copy = lm_head.bfloat16() if right else lm_head.flip(0)
    write_heads(tmp_path, random_heads(shared=True), "vllm", lm_head=copy)
    model = stage(folder, HeadShape(2, 1))
    if right:
        load(model, folder, tmp_path)
        assert torch.equal(model.lm_head.weight, lm_head)
    else:
        with pytest.raises(CheckpointError, match="they are of another model"):
            load(model, folder, tmp_path)


@pytest.mark.parametrize("heads_see", ["root", "hydra"])
@pytest.mark.parametrize(("kind", "own"), [("llama", False), ("qwen2", True)])
def test_heads_that_see_tokens_find_the_embedding_on_the_last_stage(
    tmp_path: Path, kind: str, own: bool, heads_see: HeadKind
) -> None:
    folder = tiny_folder(kind, 3)
    shape = HeadShape(2, 1, kind=heads_see, inner_size=24)
    heads = {
        f"medusa_head.{head}.0.{name}": torch.randn(size)
        for head in range(2)
        for name, size in part_shapes(32, 24, tokens_seen(heads_see, head)).items()
        if "fc" in name
    }
    write_heads(tmp_path, heads, "jupiter")
    spec = inspect_heads(tmp_path)
    assert (spec.kind, spec.inner_size, spec.num_heads) == (heads_see, 24, 2)
    assert json.loads((tmp_path / "config.json").read_text())["medusa_head_kind"] == heads_see
    model = load(stage(folder, shape, layers=range(2, 3), first=False), folder, tmp_path)
    assert ("root_embedding.weight" in model.state_dict()) is own
    hidden, roots = torch.randn(4, 32), torch.tensor([3, 1, 4, 1])
    whole = load(stage(folder, shape), folder, tmp_path)
    assert torch.equal(model.draft(hidden, roots, 9), whole.draft(hidden, roots, 9))
    assert not torch.equal(model.draft(hidden, roots, 9), model.draft(hidden, roots + 1, 9))
    with pytest.raises(CheckpointError, match=rf"kind {heads_see}\); use layout jupiter"):
        write_heads(tmp_path / "v2", heads, "v2")


@pytest.mark.parametrize("shared", [False, True])
def test_a_merged_model_loads_with_heads_from_itself(tmp_path: Path, shared: bool) -> None:
    folder = tiny_folder("llama", 3)
    heads = random_heads(shared=shared)
    write_heads(tmp_path / "heads", heads, "v2" if shared else "fasterdecoding")
    merged = tmp_path / "merged"
    merge(folder, tmp_path / "heads", merged)
    spec = inspect_heads(merged)
    assert (spec.num_heads, spec.num_layers, spec.shared_lm_head) == (2, 1, shared)
    assert read_heads(merged).keys() == heads.keys()
    model = load(stage(merged, HeadShape(2, 1, spec.vocab_size)), merged)
    state = model.state_dict()
    for name, tensor in {**reference("llama", layers=3).state_dict(), **heads}.items():
        assert torch.equal(state[name], tensor), name
