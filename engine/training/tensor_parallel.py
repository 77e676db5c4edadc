"""Tensor parallel layers (Shoeybi et al. 2019) with sequence parallel (Korthikanti et al. 2022).

Each style says how one module of the plan is shared, for torch's `parallelize_module`; the modules
themselves know nothing of it. Parameters stay plain tensors, cut to this rank's part, so that they
can lie in flat buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional as F

from engine.model.llama import LlamaAttention
from engine.training.mesh import Group
from engine.training.row_exchange import copy_in, gather_rows, repeat_rows, scatter_rows, sum_out


@dataclass(frozen=True)
class Shard:
    """Which part of a whole parameter a rank holds."""

    dim: int
    start: int
    stop: int
    size: int
    """Of the whole parameter in this dimension."""

    def cut(self, whole: Tensor) -> Tensor:
        """This part of the whole parameter."""
        return whole.narrow(self.dim, self.start, self.stop - self.start)


class Shared:
    """How the modules of a plan share their work over the ranks of `group`.

    Args:
        sequence: between the shared products each rank has a part of the rows.
    """

    def __init__(self, group: Group, *, sequence: bool) -> None:
        self.group, self.sequence = group, sequence
        self._shards: dict[nn.Parameter, Shard] = {}
        self._parts: dict[nn.Parameter, nn.Parameter] = {}

    def cut(self, module: nn.Module, name: str, dim: int) -> Shard:
        """Keep this rank's part of a parameter, along `dim`; the last may be smaller."""
        whole = module.get_parameter(name)
        part = self._parts.get(whole)  # tied weights are one parameter under two names
        if part is None:
            size = whole.shape[dim]
            step = -(-size // self.group.size)
            start = min(step * self.group.index, size)
            shard = Shard(dim, start, min(start + step, size), size)
            part = nn.Parameter(shard.cut(whole.data), requires_grad=whole.requires_grad)
            self._parts[whole], self._shards[part] = part, shard
        setattr(module, name, part)
        return self._shards[part]

    def shards(self, model: nn.Module) -> dict[str, Shard]:
        """The cut parameters of `model`, by name."""
        named = model.named_parameters(remove_duplicate=False)
        return {name: self._shards[p] for name, p in named if p in self._shards}

    def enter(self, x: Tensor) -> Tensor:
        """Rows as the shared products take them: all rows, the same on each rank."""
        return gather_rows(x, self.group) if self.sequence else copy_in(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """The sum of the ranks' products, as the layers between take it."""
        return scatter_rows(x, self.group) if self.sequence else sum_out(x, self.group)


class Columns(ParallelStyle):
    """A product whose outputs are shared."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, _ in list(module.named_parameters()):
            self.shared.cut(module, name, 0)
        return module


class Rows(ParallelStyle):
    """A product whose inputs are shared; the bias is added once, to the sum."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Linear)
        self.shared.cut(module, "weight", 1)

        def forward(x: Tensor) -> Tensor:
            out = self.shared.leave(F.linear(x, module.weight))
            return out if module.bias is None else out + module.bias

        module.forward = forward  # type: ignore
        return module


class Entered(ParallelStyle):
    """A block whose products are shared; of attention, each rank has some of the heads."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (self.shared.enter(args[0]), *args[1:])

        module.register_forward_pre_hook(enter)
        if isinstance(module, LlamaAttention):
            module.num_heads //= self.shared.group.size
            module.num_kv_heads //= self.shared.group.size
        return module


class Vocabulary(ParallelStyle):
    """An embedding whose tokens are shared: the others' are zero here, and the parts added up."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        shard = self.shared.cut(module, "weight", 0)
        padding = module.padding_idx
        own = padding is not None and shard.start <= padding < shard.stop
        module.padding_idx = padding - shard.start if own and padding is not None else None

        def forward(tokens: Tensor) -> Tensor:
            return self.shared.leave(look_up(module, tokens, shard))

        module.forward = forward  # type: ignore
        return module


def look_up(module: nn.Embedding, tokens: Tensor, shard: Shard) -> Tensor:
    """This rank's part of the sum over the ranks that is the embedding of `tokens`."""
    absent = (tokens < shard.start) | (tokens >= shard.stop)
    places = (tokens - shard.start).masked_fill(absent, 0)
    found = F.embedding(places, module.weight, module.padding_idx)
    return found.masked_fill(absent[:, None], 0.0)


class Whole(ParallelStyle):
    """A norm behind which all ranks do the same with all rows."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self.shared.sequence:
            module.register_forward_hook(
                lambda module, args, out: repeat_rows(out, self.shared.group)
            )
        return module


def root_lookup(table: nn.Module, shard: Shard, group: Group) -> Callable[[Tensor], Tensor]:
    """`embed_root` of a model whose embedding is shared; no gradient flows."""

    @torch.no_grad()
    def embed(tokens: Tensor) -> Tensor:
        absent = (tokens < shard.start) | (tokens >= shard.stop)
        found = table.get_parameter("weight")[(tokens - shard.start).masked_fill(absent, 0)]
        return group.sum_(found.masked_fill(absent[..., None], 0.0))

    return embed


def cut_to(shards: Mapping[str, Shard]) -> Callable[[str, Tensor], Tensor]:
    """What `load_weights` keeps of a tensor that it has read."""
    return lambda name, whole: shards[name].cut(whole) if name in shards else whole
