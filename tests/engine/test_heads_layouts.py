"""The head layouts in the wild, read into one set of names and written again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint.heads import (
    HeadSpec,
    check_heads,
    inspect_heads,
    read_heads,
    write_heads,
)
from engine.errors import CheckpointError
from engine.model.config import ModelConfig
from tests.tiny import reference, save

HEADS, WIDTH, VOCAB = 3, 4, 10
Heads = dict[str, Tensor]


def random_heads(layers: int = 1, *, outputs: int | None = VOCAB) -> Heads:
    """Heads under their canonical names; `outputs` None shares lm_head."""
    torch.manual_seed(1)
    tensors = {}
    for head in range(HEADS):
        for layer in range(layers):
            tensors[f"medusa_head.{head}.{layer}.linear.weight"] = torch.randn(WIDTH, WIDTH)
            tensors[f"medusa_head.{head}.{layer}.linear.bias"] = torch.randn(WIDTH)
        if outputs is not None:
            tensors[f"medusa_head.{head}.{layers}.weight"] = torch.randn(outputs, WIDTH)
    return tensors


def assert_same(left: Heads, right: Heads) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def fasterdecoding(heads: Heads) -> Heads:
    return {name.removeprefix("medusa_head."): tensor for name, tensor in heads.items()}


def save_pt(heads: Heads, folder: Path) -> Path:
    torch.save(fasterdecoding(heads), folder / "medusa_lm_head.pt")
    (folder / "config.json").write_text('{"medusa_num_heads": 2, "medusa_num_layers": 1}')
    return folder


def save_safetensors(heads: Heads, folder: Path) -> Path:
    save_file(fasterdecoding(heads), folder / "medusa_lm_head.safetensors")
    return folder


def save_one_file(heads: Heads, folder: Path) -> Path:
    torch.save(fasterdecoding(heads), folder / "any name.pt")
    return folder / "any name.pt"


def save_merged(heads: Heads, folder: Path) -> Path:
    base = {
        "model.embed_tokens.weight": torch.zeros(VOCAB, WIDTH),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(1, WIDTH),
        "lm_head.weight": torch.zeros(VOCAB, WIDTH),
    }
    save_file({**base, **heads}, folder / "model.safetensors")
    return folder


def save_vllm(heads: Heads, folder: Path, prefix: str = "") -> Path:
    write_heads(folder, heads, "vllm")
    tensors = {prefix + name: t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def save_vllm_with_prefix(heads: Heads, folder: Path) -> Path:
    return save_vllm(heads, folder, "medusa_heads.")


LAYOUTS = [
    save_pt,
    save_safetensors,
    save_one_file,
    save_merged,
    save_vllm,
    save_vllm_with_prefix,
]


@pytest.mark.parametrize("write", LAYOUTS)
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_every_layout_reads_as_the_same_heads(
    tmp_path: Path, write: Callable[[Heads, Path], Path], layers: int
) -> None:
    heads = random_heads(layers)
    path = write(heads, tmp_path)
    assert inspect_heads(path) == HeadSpec(HEADS, layers, WIDTH, VOCAB)
    assert_same(read_heads(path), heads)
    assert len(read_heads(path, max_heads=2)) == 2 * (2 * layers + 1)
    assert_same(read_heads(path, max_heads=9), heads)


@pytest.mark.parametrize("write", [save_pt, save_safetensors, save_one_file, save_merged])
def test_heads_without_output_layers_share_lm_head(
    tmp_path: Path, write: Callable[[Heads, Path], Path]
) -> None:
    heads = random_heads(2, outputs=None)
    path = write(heads, tmp_path)
    spec = inspect_heads(path)
    assert spec == HeadSpec(HEADS, 2, WIDTH, None) and spec.shared_lm_head
    assert_same(read_heads(path), heads)


def test_version_2_is_written_as_it_is_read(tmp_path: Path) -> None:
    heads = random_heads(1, outputs=None)
    write_heads(tmp_path, heads, "v2", base_model="org/base")
    stored = load_file(tmp_path / "medusa_lm_head.safetensors")
    assert_same(stored, fasterdecoding(heads))
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "medusa_num_heads": HEADS,
        "medusa_num_layers": 1,
        "version": "2",
        "base_model_name_or_path": "org/base",
    }
    assert_same(read_heads(tmp_path), heads)


def test_fasterdecoding_is_written_as_it_is_read(tmp_path: Path) -> None:
    heads = random_heads(2)
    write_heads(tmp_path / "new" / "folder", heads)
    assert_same(read_heads(tmp_path / "new" / "folder"), heads)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "medusa_lm_head.safetensors",
    ]


def test_vllm_is_written_under_its_own_names(tmp_path: Path) -> None:
    heads = random_heads(1)
    write_heads(tmp_path, heads, "vllm")
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["blocks.2.layers.0.bias"], heads["medusa_head.2.0.linear.bias"])
    assert torch.equal(stored["lm_heads.1.weight"], heads["medusa_head.1.1.weight"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_heads"], config["num_hidden_layers"]) == (HEADS, 1)
    assert config["medusa_fc_bias"] and not config["original_lm_head"]
    assert config["vocab_size"] == config["truncated_vocab_size"] == VOCAB


def test_vllm_blocks_without_bias_have_a_bias_of_zero(tmp_path: Path) -> None:
    write_heads(tmp_path, random_heads(1), "vllm")
    stored = load_file(tmp_path / "model.safetensors")
    bare = {name: t.half() for name, t in stored.items() if not name.endswith("bias")}
    save_file(bare, tmp_path / "model.safetensors")
    heads = read_heads(tmp_path)
    assert heads.keys() == random_heads(1).keys()
    bias = heads["medusa_head.1.0.linear.bias"]
    assert torch.equal(bias, torch.zeros(WIDTH, dtype=torch.float16))


@pytest.mark.parametrize("stored_rows", ["all", "mapped"])
def test_a_token_map_keeps_its_own_rows(tmp_path: Path, stored_rows: str) -> None:
    token_map = torch.tensor([7, 1, 4])
    full = random_heads(1)
    cut = {n: t[token_map] if n.endswith("1.weight") else t for n, t in full.items()}
    cut["token_map"] = token_map
    write_heads(tmp_path, cut, "vllm", vocab_size=VOCAB)
    if stored_rows == "all":
        outputs = {f"lm_heads.{h}.weight": full[f"medusa_head.{h}.1.weight"] for h in range(HEADS)}
        file = tmp_path / "model.safetensors"
        save_file({**load_file(file), **outputs}, file)
    assert inspect_heads(tmp_path) == HeadSpec(HEADS, 1, WIDTH, 3, (7, 1, 4))
    assert_same(read_heads(tmp_path), cut)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["vocab_size"], config["truncated_vocab_size"]) == (VOCAB, 3)


@pytest.mark.parametrize("key", ["lm_head.weight", "lm_heads.0.weight"])
def test_the_original_lm_head_of_vllm_is_the_models_own(tmp_path: Path, key: str) -> None:
    heads = random_heads(1, outputs=None)
    write_heads(tmp_path, heads, "vllm", lm_head=torch.ones(VOCAB, WIDTH))
    assert json.loads((tmp_path / "config.json").read_text())["original_lm_head"] is True
    stored = load_file(tmp_path / "model.safetensors")
    stored[key] = stored.pop("lm_head.weight")
    save_file(stored, tmp_path / "model.safetensors")
    assert inspect_heads(tmp_path) == HeadSpec(HEADS, 1, WIDTH, None)
    assert_same(read_heads(tmp_path), heads)


def test_with_original_lm_head_in_the_config_all_heads_share_one(tmp_path: Path) -> None:
    write_heads(tmp_path, random_heads(1), "vllm")
    (tmp_path / "config.json").write_text('{"original_lm_head": true}')
    assert inspect_heads(tmp_path).shared_lm_head
    blocks = {name: t for name, t in random_heads(1).items() if ".linear." in name}
    assert_same(read_heads(tmp_path), blocks)


@pytest.mark.parametrize(
    ("layout", "kind", "said"),
    [
        ("fasterdecoding", "shared", "use layout v2"),
        ("fasterdecoding", "mapped", "use layout vllm"),
        ("v2", "own", "use layout fasterdecoding"),
        ("v2", "mapped", "use layout vllm"),
        ("vllm", "shared", "without a copy"),
    ],
)
def test_a_kind_of_heads_that_a_layout_cannot_hold_is_refused(
    tmp_path: Path, layout: str, kind: str, said: str
) -> None:
    heads = random_heads(1, outputs={"own": VOCAB, "shared": None, "mapped": 2}[kind])
    if kind == "mapped":
        heads["token_map"] = torch.tensor([0, 1])
    with pytest.raises(CheckpointError, match=said):
        write_heads(tmp_path / "out", heads, layout)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"0.0.linear.bias": None}, "0.0.linear.bias is missing"),
        ({"1.1.weight": None}, "1.1.weight is missing"),
        ({"1.0.linear.weight": None}, "1.0.linear.weight is missing"),
        ({"0.0.linear.weight": (4, 5)}, r"is \[4, 5\], which does not fit"),
        ({"2.1.weight": (9, 4)}, r"2.1.weight is \[9, 4\], which does not fit \[10, 4\]"),
        ({"2.1.weight": None, "2.2.weight": (10, 4)}, "head 2 has 2 ResBlocks"),
        ({"0.0.hydra.weight": (4, 4)}, "0.0.hydra.weight belongs to no known kind"),
    ],
)
def test_incomplete_and_unknown_heads_are_named(
    tmp_path: Path, change: dict[str, tuple[int, ...] | None], said: str
) -> None:
    heads = fasterdecoding(random_heads(1))
    for name, shape in change.items():
        if shape is None:
            del heads[name]
        else:
            heads[name] = torch.zeros(shape)
    save_file(heads, tmp_path / "medusa_lm_head.safetensors")
    with pytest.raises(CheckpointError, match=said):
        inspect_heads(tmp_path)


def test_a_folder_without_heads_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weight files"):
        inspect_heads(tmp_path)
    save_merged({}, tmp_path)
    with pytest.raises(CheckpointError, match="holds no Medusa heads"):
        inspect_heads(tmp_path)


def test_torn_heads_are_named(tmp_path: Path) -> None:
    for write, name in ((save_safetensors, "safetensors"), (save_one_file, "pt")):
        path = write(random_heads(), tmp_path)
        file = path if path.is_file() else path / "medusa_lm_head.safetensors"
        file.write_bytes(file.read_bytes()[:-30])
        with pytest.raises(CheckpointError, match=rf"{name}: (cut short|damaged)"):
            inspect_heads(path)


def test_torch_files_are_inspected_without_loading_torch_here(tmp_path: Path) -> None:
    save_pt(random_heads(2), tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "from engine.checkpoint.head_layouts import inspect_heads\n"
        f"print(inspect_heads(Path({str(tmp_path)!r})), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == f"{HeadSpec(HEADS, 2, WIDTH, VOCAB)} False\n"


def test_heads_of_another_model_are_refused_with_both_numbers(tmp_path: Path) -> None:
    model = ModelConfig.from_folder(save(reference(layers=1), tmp_path))
    check_heads(HeadSpec(2, 1, 32, 260), model, tmp_path)
    check_heads(HeadSpec(2, 1, 32, None), model, tmp_path)
    check_heads(HeadSpec(2, 1, 32, 3, (0, 259, 7)), model, tmp_path)
    with pytest.raises(CheckpointError, match=r"width 64, but the model's hidden_size is 32"):
        check_heads(HeadSpec(2, 1, 64, 260), model, tmp_path)
    with pytest.raises(CheckpointError, match=r"261 output rows, but .* vocab_size is 260"):
        check_heads(HeadSpec(2, 1, 32, 261), model, tmp_path)
    with pytest.raises(CheckpointError, match=r"up to 260, but .* vocab_size is 260"):
        check_heads(HeadSpec(2, 1, 32, 2, (0, 260)), model, tmp_path)
