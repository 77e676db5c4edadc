"""GGUF files become Hugging Face folders, equal to what transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.checkpoint.convert import convert_gguf
from engine.checkpoint.gguf_file import GGUFCheckpoint
from engine.errors import CheckpointError
from engine.model.config import ModelConfig
from tests.gguf_files import TOKENS, write_gguf
from tests.tiny import KINDS, reference

TEXTS = ["hello world", " 12 é \n<|im_start|>hello<|im_end|>", "", "世界 hello  hello"]


def convert(file: Path, folder: Path) -> Path:
    folder.mkdir()
    GGUFCheckpoint(file).write(folder, lambda done, total: None)
    return folder


@pytest.mark.parametrize("model_kind", ["llama", "mistral", "qwen2"])
def test_weights_come_back_as_the_model_had_them(tmp_path: Path, model_kind: str) -> None:
    model = reference(model_kind, layers=2, vocab=len(TOKENS))
    folder = convert(write_gguf(model, tmp_path / "tiny.gguf"), tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = torch.tensor([[5, 9, 100, 7]])
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-6)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1])
@pytest.mark.parametrize("model_kind", ["llama", "qwen2"])
def test_dequantized_weights_equal_those_of_transformers(
    tmp_path: Path, kind: Kind, model_kind: str
) -> None:
    model = reference(model_kind, layers=1, vocab=len(TOKENS))
    file = write_gguf(model, tmp_path / "tiny.gguf", kind=kind)
    folder = convert(file, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor.float()), name


def test_half_precision_weights_are_kept_as_they_are(tmp_path: Path) -> None:
    file = write_gguf(reference(layers=1, vocab=len(TOKENS)), tmp_path / "a.gguf", kind=Kind.BF16)
    tensors = load_file(convert(file, tmp_path / "hf") / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.norm.weight"].dtype == torch.float32


def test_tokens_and_template_equal_those_of_transformers(tmp_path: Path) -> None:
    file = write_gguf(reference(layers=1, vocab=len(TOKENS)), tmp_path / "tiny.gguf")
    folder = tmp_path / "hf"
    folder.mkdir()
    convert_gguf(file, folder)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    again = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        expected = theirs(text).input_ids
        assert expected[0] == 1  # this file asks for a bos token
        assert plain.encode(text).ids == again(text).input_ids == expected
        bare = theirs(text, add_special_tokens=False).input_ids
        assert plain.encode(text, add_special_tokens=False).ids == bare
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == theirs.chat_template == again.chat_template
    assert settings["bos_token"] == "<|im_start|>"
    assert not (folder / "chat_template.jinja").exists()
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_an_end_of_turn_token_of_its_own_stops_too(tmp_path: Path) -> None:
    model = reference(layers=1, vocab=len(TOKENS))
    end_of_turn = {"tokenizer.ggml.eot_token_id": 7}
    file = write_gguf(model, tmp_path / "a.gguf", metadata=end_of_turn)
    folder = convert(file, tmp_path / "hf")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


@pytest.mark.parametrize("kind", [*KINDS])
def test_the_config_says_what_the_model_is(tmp_path: Path, kind: str) -> None:
    model = reference(kind, layers=1, vocab=len(TOKENS))
    metadata: dict[str, object] = {}
    tensors = {}
    if kind == "llama3_rope":
        model = reference(
            kind,
            layers=1,
            vocab=len(TOKENS),
            rope_parameters={
                **KINDS[kind][1]["rope_parameters"],
                "rope_theta": 500000.0,
                "factor": 32.0,
                "original_max_position_embeddings": 8192,
            },
        )
        base = 1 / 500000.0 ** (torch.arange(0, 8, 2).float() / 8)
        stretched = model.model.rotary_emb.inv_freq
        tensors["rope_freqs.weight"] = (base / stretched).numpy()
    if kind == "linear_rope":
        metadata = {"rope.scaling.type": "linear", "rope.scaling.factor": 2}
    file = write_gguf(model, tmp_path / "a.gguf", metadata=metadata, tensors=tensors)
    ours = ModelConfig.from_folder(convert(file, tmp_path / "hf"))
    model.config.architectures = [type(model).__name__]
    theirs = ModelConfig.from_dict(model.config.to_dict())
    for field in ("model_type", "bos_token_id", "eos_token_id", "pad_token_id", "rms_norm_eps"):
        assert getattr(ours, field) is not None  # of the tokenizer, or rounded to float32
        object.__setattr__(theirs, field, getattr(ours, field))
    assert ours == theirs


def test_an_unknown_rope_scaling_is_refused(tmp_path: Path) -> None:
    model = reference(layers=1, vocab=len(TOKENS))
    factors = np.array([1.0, 3.0, 2.0, 9.0], dtype=np.float32)
    file = write_gguf(model, tmp_path / "a.gguf", tensors={"rope_freqs.weight": factors})
    with pytest.raises(CheckpointError, match=r"a\.gguf: rope_freqs\.weight"):
        GGUFCheckpoint(file)
    file = write_gguf(model, tmp_path / "b.gguf", metadata={"rope.scaling.type": "yarn"})
    with pytest.raises(CheckpointError, match=r'b\.gguf: rope scaling "yarn"'):
        GGUFCheckpoint(file)


def test_unsupported_architectures_and_features_are_named(tmp_path: Path) -> None:
    model = reference(layers=1, vocab=len(TOKENS))
    with pytest.raises(CheckpointError, match='architecture "gemma" is not supported'):
        GGUFCheckpoint(write_gguf(model, tmp_path / "a.gguf", arch="gemma"))
    with pytest.raises(CheckpointError, match="mixture-of-experts"):
        GGUFCheckpoint(write_gguf(model, tmp_path / "b.gguf", metadata={"expert_count": 8}))
    extra = {"blk.0.attn_q_norm.weight": np.ones(8, dtype=np.float32)}
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q_norm\.weight"):
        GGUFCheckpoint(write_gguf(model, tmp_path / "c.gguf", tensors=extra))
    with pytest.raises(CheckpointError, match="partial rotary embedding"):
        key_length = {"attention.key_length": 16}
        GGUFCheckpoint(write_gguf(model, tmp_path / "d.gguf", metadata=key_length))


@pytest.mark.parametrize("kept", [0, 10, 5000, 0.5, 0.99])
def test_a_file_cut_short_is_named(tmp_path: Path, kept: float) -> None:
    file = write_gguf(reference(layers=1, vocab=len(TOKENS)), tmp_path / "torn.gguf")
    data = file.read_bytes()
    file.write_bytes(data[: int(kept if kept >= 10 else kept * len(data))])
    with pytest.raises(CheckpointError, match=r"torn\.gguf: not a whole GGUF file"):
        GGUFCheckpoint(file)
