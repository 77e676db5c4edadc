"""What a run leaves for the engine: trained heads, and with Medusa-2 the trained base."""

from __future__ import annotations

import json
import shutil
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
from engine.model.medusa import MedusaLlamaForCausalLM
from engine.training.args_medusa import Layout
from engine.training.mesh import Mesh


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


def export_base(
    model: MedusaLlamaForCausalLM, source: Path, folder: Path, mesh: Mesh, dtype: torch.dtype
) -> None:
    """Write the trained base as a Hugging Face folder, one file a stage; every rank calls this.

    Tokenizer, template and config are those of the model in `source`.

    Raises:
        EngineError: on all ranks, when one could not write.
    """
    problem = ""
    try:
        if mesh.replica == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _write_stage(model, folder / _file(mesh.stage, mesh.pp), dtype)
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


def _write_stage(model: MedusaLlamaForCausalLM, path: Path, dtype: torch.dtype) -> None:
    tied = model.config.tie_word_embeddings
    entries = [
        tensor_entry(name, tuple(tensor.shape), dtype, partial(_same, tensor))
        for name, tensor in model.state_dict().items()
        if not name.startswith(HEADS) and not (tied and name == LM_HEAD)
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
    for name in TEXT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in config else "torch_dtype"  # transformers 5's name, and 4's
    config[key] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
