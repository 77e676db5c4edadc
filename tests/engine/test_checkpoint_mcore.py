"""Megatron-Core's layout: what is written comes back bit for bit, however it was cut."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.checkpoint.dcp import DcpReader
from engine.checkpoint.mcore import McoreReader, read_common
from engine.checkpoint.mcore_convert import to_mcore
from engine.checkpoint.reader import open_checkpoint
from engine.errors import CheckpointError
from engine.model.config import ModelConfig
from tests.tiny import tiny_folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    with open_checkpoint(folder) as reader:
        return {name: reader.tensor(name) for name in reader.keys()}  # noqa: SIM118


@pytest.mark.parametrize("kind", ["llama", "linear_rope", "mistral", "qwen2"])
def test_a_model_comes_back_as_it_was_cut_or_not(kind: str, tmp_path: Path) -> None:
    folder = tiny_folder(kind)
    tensors = weights_of(folder)
    for ranks in (1, 2):
        to_mcore(folder, tmp_path / str(ranks), tp=ranks)
        with McoreReader(tmp_path / str(ranks)) as reader:
            assert set(reader.keys()) == set(tensors)
            for name, tensor in tensors.items():
                assert reader.shape(name) == tuple(tensor.shape)
                assert torch.equal(reader.tensor(name), tensor), name


def test_the_layout_is_megatron_cores(tmp_path: Path) -> None:
    folder = tiny_folder("qwen2")
    config = ModelConfig.from_folder(folder)
    tensors = weights_of(folder)
    to_mcore(folder, tmp_path / "mcore", tp=2)
    path = tmp_path / "mcore" / "iter_0000001"
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
    gate, up = (tensors[f"model.layers.2.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    joined = DcpReader(path).box("decoder.layers.mlp.linear_fc1.weight")[2]
    assert torch.equal(joined, torch.cat([gate, up]))
    common = read_common(path)
    assert common["iteration"] == 1 and common["checkpoint_version"] == 3.0
    assert common["args"].tensor_model_parallel_size == 2


def test_metadata_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="damaged"):
        DcpReader(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_damage_is_named(tmp_path: Path) -> None:
    folder, mcore = tiny_folder("llama"), tmp_path / "mcore"
    to_mcore(folder, mcore)
    (file,) = (mcore / "iter_0000001").glob("*.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        list(map(McoreReader(mcore).tensor, weights_of(folder)))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: missing"):
        McoreReader(mcore).tensor("model.norm.weight")
