"""Reading and writing the tensors of Medusa heads, in any of the layouts in use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engine.checkpoint.head_layouts import (
    TOKEN_MAP,
    HeadSpec,
    block_name,
    check_heads,
    head_weights,
    inspect_heads,
    make_spec,
    original_lm_head,
    output_name,
    part_shapes,
    read_layout,
    root_name,
)
from engine.checkpoint.reader import open_checkpoint
from engine.checkpoint.safetensors_file import SINGLE_FILE, write_file
from engine.checkpoint.tensor_entry import tensor_entry
from engine.checkpoint.weight_files import HEAD_FILES
from engine.errors import CheckpointError
from engine.model.head_kinds import tokens_seen

__all__ = ["HeadReader", "HeadSpec", "check_heads", "inspect_heads", "read_heads", "write_heads"]

LM_HEAD = "lm_head.weight"
Layout = Literal["fasterdecoding", "v2", "vllm", "jupiter"]


class HeadReader:
    """The heads of the checkpoint at `path` under their canonical names, read when asked for.

    Raises:
        CheckpointError: no heads, or damaged, incomplete or unknown ones; the file is named.
    """

    def __init__(self, path: Path) -> None:
        self.path = head_weights(path)
        self._reader = open_checkpoint(self.path)
        shapes = self._reader.shapes()
        self.layout = read_layout(shapes, self.path, original=original_lm_head(self.path))
        self.token_map: Tensor | None = None
        """int64 [rows of the output layers]: the token id of each."""
        if self.layout.token_map is not None:
            self.token_map = self._reader.tensor(self.layout.token_map).long()
        values = None if self.token_map is None else tuple(self.token_map.tolist())
        self.spec = make_spec(self.layout, shapes, values, self.path)

    def keys(self) -> list[str]:
        """Canonical names of all parts, biases included."""
        return head_names(self.spec.num_heads, self.spec)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a part that `tensor` gives."""
        spec, (_, head, _, part) = self.spec, name.split(".", 3)
        if part == "weight":
            return (spec.vocab_size or 0, spec.hidden_size)
        return part_shapes(spec.hidden_size, spec.inner_size, tokens_seen(spec.kind, int(head)))[
            part
        ]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a part that `tensor` gives."""
        return self._reader.dtype(self._stored_weight(name))

    def _stored_weight(self, name: str) -> str:
        """The stored name of a part; of the block's weight for a bias that is left out."""
        names = self.layout.names
        return names[name] if name in names else names[name.removesuffix("bias") + "weight"]

    def tensor(self, name: str) -> Tensor:
        """A part by its canonical name.

        Biases that the layout leaves out are zeros; of output layers over the whole vocabulary,
        only the rows of the token map are given, where there is one.
        """
        if name not in self.layout.names:
            if name not in self.keys():
                raise CheckpointError(f"{self.path}: tensor {name} is missing")
            return torch.zeros(self.shape(name), dtype=self.dtype(name))
        tensor = self._reader.tensor(self.layout.names[name])
        is_output = name.split(".", 3)[-1] == "weight"
        if is_output and self.token_map is not None and len(tensor) > len(self.token_map):
            return tensor[self.token_map]
        return tensor

    def lm_head(self) -> Tensor | None:
        """The copy of the model's `lm_head` that came with the heads, if one did."""
        name = self.layout.lm_head
        return None if name is None else self._reader.tensor(name)


def head_names(num_heads: int, spec: HeadSpec) -> list[str]:
    """Canonical names of all parts of the first `num_heads` heads."""
    names = []
    for head in range(num_heads):
        if spec.inner_size:
            parts = [(fc, kind) for fc in ("fc1", "fc2") for kind in ("weight", "bias")]
            names += [root_name(head, fc, kind) for fc, kind in parts]
        for layer in range(int(spec.inner_size > 0), spec.num_layers):
            names += [block_name(head, layer, kind) for kind in ("weight", "bias")]
        if not spec.shared_lm_head:
            names.append(output_name(head, spec.num_layers))
    return names


def read_heads(path: Path, max_heads: int | None = None) -> dict[str, Tensor]:
    """The heads at `path` under their canonical names, the first `max_heads` of them.

    With a vocabulary of their own the dict has `token_map` too, int64 [rows].

    Raises:
        CheckpointError: as for HeadReader.
    """
    reader = HeadReader(path)
    count = reader.spec.num_heads
    names = head_names(count if max_heads is None else min(count, max_heads), reader.spec)
    tensors = {name: reader.tensor(name) for name in names}
    if reader.token_map is not None:
        tensors[TOKEN_MAP] = reader.token_map
    return tensors


def write_heads(
    folder: Path,
    tensors: Mapping[str, Tensor],
    layout: Layout = "fasterdecoding",
    *,
    base_model: str | None = None,
    lm_head: Tensor | None = None,
    vocab_size: int | None = None,
) -> None:
    """Write heads with canonical names, as `read_heads` gives them, to `folder` with a config.json.

    Args:
        base_model: name of the model they belong to, for the config.
        lm_head: the model's own, [vocab_size, hidden_size]; vLLM wants it with heads that share
            it.
        vocab_size: of the model, where the heads cover a part of it.

    Raises:
        CheckpointError: incomplete heads, or a kind that the layout cannot hold.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    token_map = tensors.get(TOKEN_MAP)
    values = None if token_map is None else tuple(token_map.tolist())
    spec = make_spec(read_layout(shapes, folder), shapes, values, folder)
    _refuse(spec, layout, folder, lm_head)
    if layout == "vllm":
        named = {_vllm_name(name): tensor for name, tensor in tensors.items()}
        if spec.shared_lm_head and lm_head is not None:
            named[LM_HEAD] = lm_head
        config = _vllm_config(spec, lm_head, vocab_size)
    else:
        named = {name.removeprefix("medusa_head."): tensor for name, tensor in tensors.items()}
        config = {"medusa_num_heads": spec.num_heads, "medusa_num_layers": spec.num_layers}
        if layout == "v2":
            config["version"] = "2"
        elif layout == "jupiter":
            config |= {"medusa_head_kind": spec.kind, "medusa_inner_size": spec.inner_size}
    if base_model is not None:
        config["base_model_name_or_path"] = base_model
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (SINGLE_FILE if layout == "vllm" else HEAD_FILES[0])
    unfinished = file.with_name(f".{file.name}.partial")
    entries = [
        tensor_entry(name, tuple(tensor.shape), tensor.dtype, partial(Tensor.detach, tensor))
        for name, tensor in named.items()
    ]
    for _ in write_file(unfinished, entries):
        pass
    unfinished.replace(file)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _refuse(spec: HeadSpec, layout: Layout, folder: Path, lm_head: Tensor | None) -> None:
    """Raise CheckpointError for a kind of heads that `layout` cannot hold."""
    if layout != "jupiter" and spec.inner_size:
        problem = f"heads that see tokens (kind {spec.kind}); use layout jupiter"
    elif layout not in ("vllm", "jupiter") and spec.token_map is not None:
        problem = "a token_map (a part of the vocabulary); use layout vllm"
    elif layout == "fasterdecoding" and spec.shared_lm_head:
        problem = "heads that share lm_head; use layout v2"
    elif layout == "v2" and not spec.shared_lm_head:
        problem = "heads with output layers of their own; use layout fasterdecoding"
    elif layout == "vllm" and spec.shared_lm_head and lm_head is None:
        problem = "heads that share lm_head without a copy of it"
    else:
        return
    raise CheckpointError(f"{folder}: layout {layout} cannot hold {problem}")


def _vllm_name(name: str) -> str:
    parts = name.split(".")  # medusa_head.{h}.{l}.linear.{kind} or medusa_head.{h}.{L}.weight
    if name == TOKEN_MAP:
        return name
    if parts[3] == "linear":
        return f"blocks.{parts[1]}.layers.{parts[2]}.{parts[4]}"
    return f"lm_heads.{parts[1]}.weight"


def _vllm_config(spec: HeadSpec, lm_head: Tensor | None, vocab_size: int | None) -> dict[str, Any]:
    rows = spec.vocab_size if lm_head is None else len(lm_head)
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": spec.hidden_size,
        "num_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "vocab_size": vocab_size or rows,
        "truncated_vocab_size": rows,
        "medusa_fc_bias": True,
        "original_lm_head": spec.shared_lm_head,
    }
