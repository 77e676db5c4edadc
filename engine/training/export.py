"""What a run leaves for the engine: trained heads, and with Medusa-2 the trained base."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.head_layouts import TOKEN_MAP
from engine.checkpoint.heads import write_heads
from engine.checkpoint.hub import TEXT_FILES
from engine.checkpoint.load import EMBEDDING, HEADS, LM_HEAD
from engine.checkpoint.safetensors_file import INDEX_FILE, read_index, write_file
from engine.checkpoint.tensor_entry import tensor_entry
from engine.errors import EngineError
from engine.model.config import ModelConfig
from engine.model.medusa import MedusaLlamaForCausalLM
from engine.training.args_medusa import Layout
from engine.training.mesh import Group, Mesh
from engine.training.parallelize import Part


def export_heads(
    model: MedusaLlamaForCausalLM,
    folder: Path,
    *,
    layout: Layout,
    dtype: torch.dtype,
    base_model: str,
    trained_on: Tensor | None = None,
) -> None:
    """Write the heads of the last stage to `folder`, which `medusa_head_path` may name.

    trained_on: token ids, int64 [n], where the heads were held to a part of the vocabulary. Heads
    that share `lm_head` then draft from these alone, in a layout that can say so.

    Raises:
        EngineError: it cannot be written.
    """
    tensors = {
        name: tensor.detach().to(dtype)
        for name, tensor in model.state_dict().items()
        if name.startswith(HEADS)
    }
    if model.heads.token_map is not None:
        tensors[TOKEN_MAP] = torch.tensor(model.heads.token_map)
    elif trained_on is not None and layout == "jupiter":
        tensors[TOKEN_MAP] = trained_on.cpu()
    shares = layout == "vllm" and model.heads.vocab_size is None
    lm_head = model.lm_head.weight.detach().to(dtype) if shares else None
    try:
        write_heads(
            folder,
            tensors,
            layout,
            base_model=base_model,
            lm_head=lm_head,
            vocab_size=model.config.vocab_size,
        )
    except OSError as error:
        raise EngineError(f"{folder}: cannot be written: {error.strerror}") from None


def export_base(part: Part, source: Path, folder: Path, mesh: Mesh, dtype: torch.dtype) -> None:
    """Write the trained base as a Hugging Face folder, one file a stage; every rank calls this.

    Tokenizer, template and config are those of the model in `source`.

    Raises:
        EngineError: on all ranks, when one could not write.
    """
    problem = ""
    try:
        if mesh.replica == 0 and mesh.context.index == 0:
            tensors = {n: whole(t, part, n, mesh.tensor) for n, t in _named(part).items()}
            if mesh.leads:
                folder.mkdir(parents=True, exist_ok=True)
                _write_stage(tensors, folder / _file(mesh.stage, mesh.pp), dtype)
    except OSError as error:
        problem = error.strerror or str(error)
    if told := mesh.world.first_text(problem):
        raise EngineError(f"{folder}: cannot be written: {told}")
    try:
        if mesh.rank == 0:
            _finish(source, folder, mesh.pp, dtype)
    except OSError as error:
        problem = error.strerror or str(error)
    if told := mesh.world.first_text(problem):
        raise EngineError(f"{folder}: cannot be written: {told}")


def _file(stage: int, stages: int) -> str:
    return f"model-{stage + 1:05}-of-{stages:05}.safetensors"


def _named(part: Part) -> dict[str, Tensor]:
    """The base's tensors; of tied ones the embedding alone."""
    tied = part.model.config.tie_word_embeddings
    return {
        name: tensor
        for chunk in part.chunks
        for name, tensor in chunk.state_dict().items()
        if not name.startswith(HEADS) and not (tied and name == LM_HEAD)
    }


def whole(tensor: Tensor, part: Part, name: str, group: Group) -> Tensor:
    """A parameter that the ranks of `group` share, put together; every one of them calls this."""
    shard = part.shards.get(name)
    if shard is None:
        return tensor
    rows = tensor.movedim(shard.dim, 0)
    most = -(-shard.size // group.size)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    return group.all_gather(padded)[: shard.size].movedim(0, shard.dim).contiguous()


def _write_stage(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    entries = [
        tensor_entry(name, tuple(tensor.shape), dtype, partial(_same, tensor))
        for name, tensor in tensors.items()
    ]
    for _ in write_file(path, entries):
        pass


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _finish(source: Path, folder: Path, stages: int, dtype: torch.dtype) -> None:
    places, total = {}, 0
    for name in (_file(stage, stages) for stage in range(stages)):
        for tensor, stored in read_index(folder / name).items():
            places[tensor] = name
            total += stored.end - stored.start
    assert EMBEDDING in places
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    copy_texts(source, folder)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in config else "torch_dtype"  # transformers 5's name, and 4's
    config[key] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_texts(source: Path, folder: Path, config: ModelConfig | None = None) -> None:
    """Copy config, tokenizer and chat template of the model in `source`, so that `folder` is one.

    config: of a model of another shape; config.json then says so.

    Raises:
        EngineError: they cannot be written.
    """
    try:
        for name in TEXT_FILES:
            if (source / name).is_file() and source.resolve() != folder.resolve():
                shutil.copyfile(source / name, folder / name)
        if config is not None:
            _describe(folder / "config.json", config)
    except OSError as error:
        raise EngineError(f"{folder}: cannot be written: {error.strerror}") from None


def _describe(path: Path, config: ModelConfig) -> None:
    """Bring a config.json in line with a model's shape; what agrees already stays as it is."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if ModelConfig.from_dict(values, str(path)) == config:
        return
    scaling = config.rope_scaling
    rope: dict[str, object] = {"rope_type": scaling.rope_type, "rope_theta": config.rope_theta}
    if scaling.rope_type != "default":
        rope |= {k: v for k, v in dataclasses.asdict(scaling).items() if k != "rope_type"}
    values |= {
        key: getattr(config, key)
        for key in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
            "tie_word_embeddings", "mlp_bias",
        )
    }  # fmt: skip
    values |= {"attention_bias": config.attention_bias, "rope_parameters": rope}
    values.pop("rope_scaling", None)
    values.pop("rope_theta", None)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
