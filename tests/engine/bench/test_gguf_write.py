"""What the bench writes for llama.cpp reads back as the same model."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from engine.bench.gguf_files import gguf_file
from engine.bench.gguf_write import write_gguf
from engine.checkpoint.gguf_file import GGUFCheckpoint
from engine.checkpoint.reader import open_checkpoint
from engine.model.config import ModelConfig
from tests.gguf_files import write_gguf as write_original
from tests.tiny import reference, save, tiny_folder


@pytest.mark.parametrize("name", ["llama", "linear_rope", "mistral", "qwen2"])
def test_a_model_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    folder = tiny_folder(name)
    write_gguf(folder, tmp_path / "model.gguf", Kind.F16)
    (tmp_path / "back").mkdir()
    GGUFCheckpoint(tmp_path / "model.gguf").write(tmp_path / "back", lambda done, total: None)
    with open_checkpoint(folder) as was, open_checkpoint(tmp_path / "back") as now:
        assert set(now.keys()) == {key for key in was.keys() if "rotary" not in key}  # noqa: SIM118
        for key in now.keys():  # noqa: SIM118
            torch.testing.assert_close(
                now.tensor(key).float(), was.tensor(key).float(), rtol=1e-3, atol=1e-6
            )
    before, after = ModelConfig.from_folder(folder), ModelConfig.from_folder(tmp_path / "back")
    assert after.rope_scaling == before.rope_scaling
    assert after.head_dim == before.head_dim
    assert after.tie_word_embeddings == before.tie_word_embeddings
    assert after.attention_bias == before.attention_bias


def test_the_frequency_factors_of_llama_3_are_those_of_a_released_file(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    folder = save(reference("llama3_rope", rope_parameters=scaling, head_dim=64), tmp_path / "m")
    write_gguf(folder, tmp_path / "model.gguf", Kind.F16)
    # The reader refuses factors that are not Llama 3's.
    read = GGUFCheckpoint(tmp_path / "model.gguf").config["rope_scaling"]
    assert (read["rope_type"], read["factor"]) == ("llama3", 32.0)


def test_q4_1_takes_what_has_whole_blocks(tmp_path: Path) -> None:
    write_gguf(tiny_folder(), tmp_path / "model.gguf", Kind.Q4_1)
    kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == Kind.Q4_1
    assert kinds["blk.0.ffn_down.weight"] == Kind.F16  # rows of 48 are one and a half blocks
    assert kinds["blk.0.attn_norm.weight"] == Kind.F32


def test_the_file_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPITER_CACHE_DIR", str(tmp_path / "cache"))
    said: list[str] = []
    folder = tiny_folder()
    first = gguf_file(str(folder), folder, "F16", said.append)
    stamp = first.stat().st_mtime_ns
    assert gguf_file(str(folder), folder, "F16", said.append) == first
    assert first.stat().st_mtime_ns == stamp
    assert len(said) == 1


def test_the_file_that_the_model_came_as_is_taken_where_it_is_of_the_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPITER_CACHE_DIR", str(tmp_path / "cache"))
    came = write_original(reference("llama"), tmp_path / "came.gguf", kind=Kind.Q4_1)
    assert gguf_file(str(came), tiny_folder(), "Q4_1", lambda line: None) == came
    written = gguf_file(str(came), tiny_folder(), "F16", lambda line: None)
    assert written.is_relative_to(tmp_path / "cache")
