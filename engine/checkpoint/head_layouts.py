"""How Medusa heads are named in the wild, and what a checkpoint of heads holds. Torch-free.

Every layout is read into one set of names, those of the merged model:
`medusa_head.{h}.{l}.linear.weight|bias` for ResBlock l of head h, and, unless the heads share the
model's `lm_head`, `medusa_head.{h}.{L}.weight` for the output layer after its L blocks. Where the
first block sees tokens (Jupiter's own layout), it is `medusa_head.{h}.0.fc1|fc2.*`; the width of
`fc1` tells how many.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engine.checkpoint.child import CONVERT, run_module
from engine.checkpoint.safetensors_file import read_integers, read_shapes
from engine.checkpoint.weight_files import HEAD_FILES, find_weights
from engine.errors import CheckpointError
from engine.model.config import ModelConfig
from engine.model.head_kinds import HeadKind, tokens_seen

Shapes = Mapping[str, tuple[int, ...]]
TOKEN_MAP = "token_map"

BLOCK = re.compile(
    r"(?:medusa_head\.)?(?P<h>\d+)\.(?P<l>\d+)\.linear\.(?P<kind>weight|bias)"
    r"|(?:medusa_heads\.)?blocks\.(?P<vh>\d+)\.layers\.(?P<vl>\d+)\.(?P<vkind>weight|bias)"
)
ROOT_BLOCK = re.compile(r"(?:medusa_head\.)?(?P<h>\d+)\.0\.(?P<part>fc[12])\.(?P<kind>weight|bias)")
OUTPUT = re.compile(
    r"(?:medusa_head\.)?(?P<h>\d+)\.(?P<l>\d+)\.weight"
    r"|(?:medusa_heads\.)?lm_heads\.(?P<vh>\d+)\.weight"
)
SHARED_OUTPUT = re.compile(r"(?:medusa_heads\.)?lm_head\.weight")
MAP = re.compile(r"(?:medusa_heads?\.)?token_map")


@dataclass(frozen=True)
class HeadSpec:
    """What a checkpoint of Medusa heads holds, counted from its tensors."""

    num_heads: int
    num_layers: int
    """Blocks per head."""
    hidden_size: int
    vocab_size: int | None
    """Rows of each head's output layer; None when the heads share the model's `lm_head`."""
    token_map: tuple[int, ...] | None = None
    """Token id of each of these rows, where they cover a part of the vocabulary."""
    inner_size: int = 0
    """Width inside the first block of heads that see tokens; 0 for ResBlocks alone."""
    kind: HeadKind = "resblock"
    """What the heads see."""

    @property
    def shared_lm_head(self) -> bool:
        """The heads are ResBlocks alone, in front of the model's own `lm_head`."""
        return self.vocab_size is None

    def first(self, num_heads: int | None) -> HeadSpec:
        """The same with at most `num_heads` heads; None leaves all."""
        if num_heads is None or num_heads >= self.num_heads:
            return self
        return replace(self, num_heads=num_heads)


@dataclass(frozen=True)
class HeadLayout:
    """Where the parts of the heads are in a checkpoint."""

    num_heads: int
    num_layers: int
    names: dict[str, str]
    """Canonical name -> name in the checkpoint; biases may be absent (vLLM), meaning zero."""
    token_map: str | None
    """Name of the token map; it has no meaning where the output layer is shared."""
    lm_head: str | None
    """Name of the copy of the model's `lm_head` that vLLM's `original_lm_head` kept."""


def block_name(head: int, layer: int, kind: str) -> str:
    """Canonical name of a ResBlock's "weight" or "bias"."""
    return f"medusa_head.{head}.{layer}.linear.{kind}"


def root_name(head: int, part: str, kind: str) -> str:
    """Canonical name of the "weight" or "bias" of "fc1" or "fc2" of a root block."""
    return f"medusa_head.{head}.0.{part}.{kind}"


def output_name(head: int, num_layers: int) -> str:
    """Canonical name of a head's output layer."""
    return f"medusa_head.{head}.{num_layers}.weight"


def head_weights(path: Path) -> Path:
    """The file of heads in a folder of heads; the folder itself for a merged model or vLLM's."""
    for name in HEAD_FILES:
        if (path / name).is_file():
            return path / name
    return path


def read_layout(shapes: Shapes, path: Path, *, original: bool = False) -> HeadLayout:
    """Find the heads among the tensors `shapes` of the checkpoint at `path`.

    With `original` (vLLM's `original_lm_head`) all heads share the output layer of head 0.

    Raises:
        CheckpointError: there are none, some are missing, or some are of an unknown kind.
    """
    found = _sort_names(shapes, path)
    outputs, lm_head = found.outputs, found.lm_head
    rooted = bool(found.roots)
    layers = 1 + max((layer for _, layer, _ in found.blocks), default=0 if rooted else -1)
    with_parts = [key[0] for key in (*found.blocks, *found.roots)]
    heads = 1 + max([*with_parts, *outputs], default=-1)
    if not heads:
        raise CheckpointError(f"{path}: holds no Medusa heads, such as 0.0.linear.weight")
    for head, (layer, name) in outputs.items():
        if layer not in (None, layers):
            raise CheckpointError(
                f"{path}: head {head} has {layer} ResBlocks before its output layer {name}, "
                f"others have {layers}"
            )
    if lm_head is None and (original or (heads > 1 and list(outputs) == [0])):
        lm_head = outputs[0][1] if 0 in outputs else None
    shared = lm_head is not None or not outputs
    names = {block_name(*part): name for part, name in found.blocks.items()}
    names |= {root_name(*part): name for part, name in found.roots.items()}
    if not shared:
        names |= {output_name(head, layers): name for head, (_, name) in outputs.items()}
    _check_complete(names, heads, layers, shared, path, rooted)
    return HeadLayout(heads, layers, names, found.token_map, lm_head)


@dataclass
class _Names:
    """The tensors of a checkpoint of heads, by what they are."""

    blocks: dict[tuple[int, int, str], str]
    roots: dict[tuple[int, str, str], str]
    outputs: dict[int, tuple[int | None, str]]
    lm_head: str | None = None
    token_map: str | None = None


def _sort_names(shapes: Shapes, path: Path) -> _Names:
    found = _Names({}, {}, {})
    merged = "model.embed_tokens.weight" in shapes
    for name in shapes:
        if merged and not name.startswith("medusa_head."):
            continue  # the base model's own
        if match := BLOCK.fullmatch(name):
            head, layer = int(match["h"] or match["vh"]), int(match["l"] or match["vl"])
            found.blocks[head, layer, match["kind"] or match["vkind"]] = name
        elif match := ROOT_BLOCK.fullmatch(name):
            found.roots[int(match["h"]), match["part"], match["kind"]] = name
        elif match := OUTPUT.fullmatch(name):
            layer_text = match["l"]
            place = None if layer_text is None else int(layer_text)
            found.outputs[int(match["h"] or match["vh"])] = (place, name)
        elif SHARED_OUTPUT.fullmatch(name):
            found.lm_head = name
        elif MAP.fullmatch(name):
            found.token_map = name
        else:
            raise CheckpointError(f"{path}: tensor {name} belongs to no known kind of Medusa heads")
    return found


def _check_complete(
    names: Mapping[str, str], heads: int, layers: int, shared: bool, path: Path, rooted: bool
) -> None:
    kinds = ["weight", "bias"] if any(name.endswith(".bias") for name in names) else ["weight"]
    for head in range(heads):
        blocks = range(int(rooted), layers)
        wanted = [block_name(head, layer, kind) for layer in blocks for kind in kinds]
        if rooted:
            wanted += [root_name(head, fc, kind) for fc in ("fc1", "fc2") for kind in kinds]
        if not shared:
            wanted.append(output_name(head, layers))
        for name in wanted:
            if name not in names:
                raise CheckpointError(
                    f"{path}: tensor {name.removeprefix('medusa_head.')} is missing"
                )


def original_lm_head(path: Path) -> bool:
    """vLLM's `original_lm_head` in the config beside the heads at `path`."""
    folder = path if path.is_dir() else path.parent
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config.get("original_lm_head"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def make_spec(
    layout: HeadLayout, shapes: Shapes, token_map: tuple[int, ...] | None, path: Path
) -> HeadSpec:
    """Measure the heads of `layout`, whose parts must fit together.

    Raises:
        CheckpointError: naming the tensor and both shapes.
    """
    root = layout.names.get(root_name(0, "fc2", "weight"))
    first = next(iter(layout.names.values()))
    hidden, inner = shapes[root] if root else (shapes[first][-1], 0)
    second = layout.names.get(root_name(1, "fc1", "weight"))
    kind: HeadKind = "root" if root else "resblock"
    if second and shapes[second][-1] == 3 * hidden:
        kind = "hydra"
    rows: int | None = None
    for name, stored in layout.names.items():
        shape = shapes[stored]
        part = name.split(".", 3)[-1]
        if part != "weight":
            seen = tokens_seen(kind, int(name.split(".")[1]))
            expected: tuple[int, ...] = part_shapes(hidden, inner, seen)[part]
        else:
            rows = rows or shape[0]
            expected = (rows, hidden)
        if shape != expected:
            raise CheckpointError(
                f"{path}: tensor {stored} is {list(shape)}, which does not fit {list(expected)}"
            )
    if token_map is not None and rows is not None:
        if rows < len(token_map):
            raise CheckpointError(
                f"{path}: the token map has {len(token_map)} tokens, the heads only {rows} rows"
            )
        rows = len(token_map)
    return HeadSpec(layout.num_heads, layout.num_layers, hidden, rows, token_map, inner, kind)


def part_shapes(hidden: int, inner: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parts of blocks, by their names in the block; `tokens` that the head sees."""
    return {
        "linear.weight": (hidden, hidden),
        "linear.bias": (hidden,),
        "fc1.weight": (inner, (1 + tokens) * hidden),
        "fc1.bias": (inner,),
        "fc2.weight": (hidden, inner),
        "fc2.bias": (hidden,),
    }


def inspect_heads(path: Path) -> HeadSpec:
    """Count and measure the heads in the file or folder `path`.

    Torch-free for safetensors; a torch file is opened in a process of its own where torch is
    not loaded.

    Raises:
        CheckpointError: no heads, or damaged, incomplete or unknown ones; the file is named.
    """
    weights = head_weights(path)
    files = find_weights(weights).files
    map_values: tuple[int, ...] | None = None
    if all(file.suffix == ".safetensors" for file in files):
        by_file = {file: read_shapes(file) for file in files}
        shapes = {name: shape for part in by_file.values() for name, shape in part.items()}
        layout = read_layout(shapes, weights, original=original_lm_head(weights))
        if layout.token_map is not None:
            (file,) = (file for file, part in by_file.items() if layout.token_map in part)
            map_values = read_integers(file, layout.token_map)
    else:
        shapes = _torch_shapes(weights)
        layout = read_layout(shapes, weights, original=original_lm_head(weights))
        if layout.token_map is not None:
            map_values = _torch_integers(weights, layout.token_map)
    return make_spec(layout, shapes, map_values, weights)


def _torch_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if "torch" in sys.modules:
        # Not by an import statement: the client must not depend on torch.
        reader = importlib.import_module("engine.checkpoint.reader")
        shapes: dict[str, tuple[int, ...]] = reader.open_checkpoint(path).shapes()
        return shapes
    lines: list[str] = []
    run_module(CONVERT, ["shapes", str(path)], lines.append)
    return {name: tuple(shape) for name, shape in json.loads(lines[-1]).items()}


def _torch_integers(path: Path, name: str) -> tuple[int, ...]:
    if "torch" in sys.modules:
        reader = importlib.import_module("engine.checkpoint.reader")
        return tuple(reader.open_checkpoint(path).tensor(name).tolist())
    lines: list[str] = []
    run_module(CONVERT, ["integers", str(path), name], lines.append)
    return tuple(json.loads(lines[-1]))


def check_heads(spec: HeadSpec, model: ModelConfig, path: Path) -> None:
    """Check that heads fit the model they are to draft for.

    Raises:
        CheckpointError: naming both numbers.
    """
    if spec.hidden_size != model.hidden_size:
        raise CheckpointError(
            f"{path}: these Medusa heads have width {spec.hidden_size}, "
            f"but the model's hidden_size is {model.hidden_size}; they are of another model"
        )
    if spec.token_map is not None:
        if (
            spec.token_map
            and not 0 <= min(spec.token_map) <= max(spec.token_map) < model.vocab_size
        ):
            raise CheckpointError(
                f"{path}: the heads' token_map goes up to {max(spec.token_map)}, "
                f"but the model's vocab_size is {model.vocab_size}"
            )
    elif spec.vocab_size not in (None, model.vocab_size):
        raise CheckpointError(
            f"{path}: these Medusa heads have {spec.vocab_size} output rows, "
            f"but the model's vocab_size is {model.vocab_size}"
        )
