"""Megatron-Core's layout: what is written comes back bit for bit, however it was cut."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.checkpoint.dcp import DcpReader, write_parts
from engine.checkpoint.mcore import (
    McoreReader,
    extra_states,
    parallel_args,
    read_common,
    to_chunks,
    write_common,
)
from engine.checkpoint.mcore_files import write_tracker
from engine.checkpoint.reader import open_checkpoint
from engine.errors import CheckpointError
from engine.model.config import ModelConfig
from tests.tiny import tiny_folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    with open_checkpoint(folder) as reader:
        return {name: reader.tensor(name) for name in reader.keys()}  # noqa: SIM118


def write(folder: Path, config: ModelConfig, tensors: dict[str, Tensor], ranks: int) -> Path:
    """An iteration as `ranks` tensor-parallel ranks write it."""
    path = folder / "iter_0000001"
    path.mkdir(parents=True)
    parts = [
        to_chunks(config, cut(tensors, rank, ranks), tp_rank=rank, tp_size=ranks)
        for rank in range(ranks)
    ]
    write_parts(path, parts, extra_states(config, range(config.num_hidden_layers)))
    write_common(path, parallel_args(config, tp=ranks, dtype=torch.float32), 1)
    write_tracker(folder, 1)
    return path


def cut(tensors: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    def part(name: str, tensor: Tensor) -> Tensor:
        if name.endswith(("norm.weight", "o_proj.bias", "down_proj.bias")) or "medusa" in name:
            return tensor
        by_columns = name.endswith(("o_proj.weight", "down_proj.weight"))
        return tensor.chunk(ranks, dim=int(by_columns))[rank]

    return {name: part(name, tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "linear_rope", "mistral", "qwen2"])
def test_a_model_comes_back_as_it_was(kind: str, ranks: int, tmp_path: Path) -> None:
    folder = tiny_folder(kind)
    config = ModelConfig.from_folder(folder)
    tensors = weights_of(folder)
    tensors["medusa_head.0.0.linear.weight"] = torch.randn(4, 4)
    write(tmp_path, config, tensors, ranks)
    reader = McoreReader(tmp_path, config)
    assert set(reader.keys()) == set(tensors)
    for name, tensor in tensors.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert torch.equal(reader.tensor(name), tensor), name
    others = 2 if ranks == 1 else 1
    for rank in range(others):  # cut in another way than it was written
        mine = cut(tensors, rank, others)
        found = reader.stage(list(mine), tp_rank=rank, tp_size=others)
        assert all(torch.equal(found[name], mine[name]) for name in mine)


def test_the_layout_is_megatron_cores(tmp_path: Path) -> None:
    folder = tiny_folder("qwen2")
    config = ModelConfig.from_folder(folder)
    tensors = weights_of(folder)
    path = write(tmp_path, config, tensors, 1)
    shapes = DcpReader(path).shapes
    layers, hidden = config.num_hidden_layers, config.hidden_size
    assert shapes["decoder.layers.self_attention.linear_qkv.weight"] == (layers, 64, hidden)
    assert shapes["decoder.layers.self_attention.linear_qkv.bias"] == (layers, 64)
    assert shapes["decoder.layers.mlp.linear_fc1.weight"] == (layers, 96, hidden)
    assert shapes["output_layer.weight"] == shapes["embedding.word_embeddings.weight"]
    joined = DcpReader(path).box("decoder.layers.self_attention.linear_qkv.weight")[2]
    q, k, v = (tensors[f"model.layers.2.self_attn.{name}_proj.weight"] for name in "qkv")
    groups = [part.view(2, -1, hidden) for part in (q, k, v)]
    assert torch.equal(joined, torch.cat(groups, dim=1).reshape(-1, hidden))
    common = read_common(path)
    assert common["iteration"] == 1 and common["checkpoint_version"] == 3.0
    assert common["args"].tensor_model_parallel_size == 1


def test_metadata_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="damaged"):
        DcpReader(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_damage_is_named(tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    config = ModelConfig.from_folder(folder)
    path = write(tmp_path, config, weights_of(folder), 1)
    (file,) = path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        list(map(McoreReader(tmp_path, config).tensor, weights_of(folder)))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: missing"):
        McoreReader(tmp_path, config).tensor("model.norm.weight")
