"""Lazy reading of weights: single and sharded, safetensors and torch files, whole and torn."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint.reader import open_checkpoint
from engine.checkpoint.safetensors_file import read_integers, read_shapes, write_sharded
from engine.checkpoint.tensor_entry import tensor_entry
from engine.checkpoint.weight_files import check_whole
from engine.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.arange(5, dtype=torch.float16),
    "c.weight": torch.arange(4, dtype=torch.bfloat16).reshape(4, 1),
    "d.weight": torch.tensor(3, dtype=torch.int64),
    "e.weight": torch.zeros(0, 7),
}
SHARDS = {"one": ["a.weight", "b.weight"], "two": ["c.weight", "d.weight", "e.weight"]}


def save(folder: Path, kind: str, *, sharded: bool) -> Path:
    """Write TENSORS in Hugging Face's naming; `kind` is "safetensors", "bin" or "old bin"."""
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")

    def write(tensors: dict[str, Tensor], name: str) -> None:
        if kind == "safetensors":
            save_file(tensors, folder / name)
        else:
            torch.save(tensors, folder / name, _use_new_zipfile_serialization=kind == "bin")

    if not sharded:
        write(TENSORS, f"{stem}.{suffix}")
        return folder
    weight_map = {}
    for shard, keys in SHARDS.items():
        write({key: TENSORS[key] for key in keys}, f"{shard}.{suffix}")
        weight_map |= dict.fromkeys(keys, f"{shard}.{suffix}")
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_are_read_by_name(tmp_path: Path, kind: str, sharded: bool) -> None:
    folder = save(tmp_path, kind, sharded=sharded)
    check_whole(folder)
    with open_checkpoint(folder) as reader:
        assert sorted(reader.keys()) == sorted(TENSORS)
        assert reader.shapes() == {key: tuple(t.shape) for key, t in TENSORS.items()}
        for key, tensor in TENSORS.items():
            assert key in reader
            assert reader.dtype(key) == reader.tensor(key).dtype == tensor.dtype
            assert torch.equal(reader.tensor(key), tensor)
        with pytest.raises(CheckpointError, match=r"tensor z\.weight is missing"):
            reader.tensor("z.weight")


def test_only_the_files_of_the_wanted_tensors_are_opened(tmp_path: Path) -> None:
    folder = save(tmp_path, "safetensors", sharded=True)
    (folder / "two.safetensors").write_bytes(b"torn")
    reader = open_checkpoint(folder)
    assert torch.equal(reader.tensor("a.weight"), TENSORS["a.weight"])
    with pytest.raises(CheckpointError, match=r"two\.safetensors: cut short"):
        reader.tensor("c.weight")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("kept", [0, 4, 20, 0.5, 0.99])
def test_a_file_cut_short_is_named(tmp_path: Path, kind: str, kept: float) -> None:
    (file,) = save(tmp_path, kind, sharded=False).iterdir()
    data = file.read_bytes()
    file.write_bytes(data[: int(kept if kept >= 4 else kept * len(data))])
    for use in (check_whole, open_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            use(tmp_path)
        assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def header(entry: object) -> bytes:
    """A safetensors file that describes one tensor of four bytes so."""
    text = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


@pytest.mark.parametrize(
    "data",
    [
        b"<html>no such page</html>",
        struct.pack("<Q", 5) + b"hello",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 11) + b'{"a": "b"} ',
        struct.pack("<Q", 1 << 60),
        header({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}),
        header({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}),
        header({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}),
        header({"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}),
        header({"dtype": "F32", "shape": [1], "data_offsets": [0]}),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        read_shapes(tmp_path / "model.safetensors")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weight files"):
        open_checkpoint(tmp_path)
    folder = save(tmp_path, "safetensors", sharded=True)
    (folder / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors: missing"):
        check_whole(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", ".."])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="refused"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": 3}', "{}", pytest.param("[" * 100_000, id="deep")]
)
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: damaged"):
        open_checkpoint(tmp_path)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code in a checkpoint was run",)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_code_is_never_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new_format: bool
) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": Evil()}, file, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: damaged, or holds more"):
        open_checkpoint(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_torch_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="must hold tensors by name"):
        open_checkpoint(tmp_path)


def test_what_is_written_in_shards_reads_the_same_elsewhere(tmp_path: Path) -> None:
    entries = [
        tensor_entry(name, tuple(tensor.shape), tensor.dtype, tensor.clone)
        for name, tensor in TENSORS.items()
    ]
    counts: list[tuple[int, int]] = []
    write_sharded(tmp_path, entries, shard_bytes=30, written=lambda *n: counts.append(n))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert counts == [(done, 5) for done in range(1, 6)]
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    ours = open_checkpoint(tmp_path)
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor) and torch.equal(ours.tensor(name), tensor)


def test_numbers_of_an_unsupported_kind_are_named(tmp_path: Path) -> None:
    entry = {"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}
    (tmp_path / "model.safetensors").write_bytes(header(entry))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: numbers of kind F8_E5M2"):
        open_checkpoint(tmp_path).tensor("a")


def test_integers_are_read_without_torch(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3), "map": torch.tensor([5, 1, 9])}, tmp_path / "a.safetensors")
    assert read_integers(tmp_path / "a.safetensors", "map") == (5, 1, 9)
    with pytest.raises(CheckpointError, match="must hold integers, not F32"):
        read_integers(tmp_path / "a.safetensors", "x")
