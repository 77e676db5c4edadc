"""What heads are before their first step: new and without effect, or trained ones gone on from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from engine.checkpoint.heads import HeadReader
from engine.errors import ConfigError
from engine.model.head_kinds import tokens_seen
from engine.model.medusa import HeadShape, ResBlock, RootBlock


@torch.no_grad()
def begin_heads(modules: nn.Module, heads: HeadShape, lm_head: nn.Linear) -> None:
    """Make heads that have learnt nothing: blocks without effect, output layers of `lm_head`.

    So each first repeats what the base predicts for the next token (Cai et al. 2024, 2.2).
    """
    weight = lm_head.weight
    if heads.token_map is not None:
        weight = weight[torch.tensor(heads.token_map, device=weight.device)]
    # The same numbers on every replica, whatever was drawn before.
    generator = torch.Generator().manual_seed(torch.initial_seed())
    for module in modules.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.linear.weight)
            nn.init.zeros_(module.linear.bias)
        elif isinstance(module, RootBlock):
            inner, width = module.fc1.weight.shape
            drawn = torch.randn(inner, width, generator=generator) / width**0.5
            module.fc1.weight.copy_(drawn)
            for parameter in (module.fc1.bias, module.fc2.weight, module.fc2.bias):
                nn.init.zeros_(parameter)
    if heads.vocab_size is not None:
        for head in modules.children():
            output = list(head.children())[-1]
            assert isinstance(output, nn.Linear)
            output.weight.copy_(weight)


@torch.no_grad()
def go_on_from(modules: nn.Module, heads: HeadShape, path: Path) -> None:
    """Give new heads what those at `path` have learnt.

    Heads that see more tokens begin without looking at them. Of a wider block the units that do
    most are kept, in a wider one those that are left stay new; heads that there are not stay new.

    Raises:
        CheckpointError: `path` holds no heads, or damaged ones.
        ConfigError: heads that these cannot go on from.
    """
    reader = HeadReader(path)
    _check(reader, heads, path)
    for number, head in enumerate(modules.children()):
        if number >= reader.spec.num_heads:
            return
        for name, parameter in head.named_parameters():
            if ".fc" not in f".{name}":
                parameter.copy_(reader.tensor(f"medusa_head.{number}.{name}"))
        first = next(head.children())
        if isinstance(first, RootBlock):
            parts = [f"{part}.{kind}" for part in ("fc1", "fc2") for kind in ("weight", "bias")]
            _fit(first, *(reader.tensor(f"medusa_head.{number}.0.{part}") for part in parts))


def _check(reader: HeadReader, heads: HeadShape, path: Path) -> None:
    found = reader.spec
    last = min(found.num_heads, heads.num_heads) - 1
    fits = (found.kind == "resblock") == (heads.kind == "resblock")
    if not fits or tokens_seen(found.kind, last) > tokens_seen(heads.kind, last):
        raise ConfigError(
            f"--medusa_head_path {path}: {heads.kind} heads cannot go on from {found.kind} heads"
        )
    if found.num_layers != heads.num_layers:
        raise ConfigError(
            f"--medusa_head_path {path}: its heads have {found.num_layers} blocks, "
            f"medusa_num_layers is {heads.num_layers}"
        )
    own = found.token_map if found.vocab_size is not None else None
    if found.vocab_size != heads.vocab_size or own != heads.token_map:
        raise ConfigError(
            f"--medusa_head_path {path}: its heads have other output layers than "
            "original_lm_head and truncated_vocab_size ask for"
        )


def _fit(block: RootBlock, fc1: Tensor, bias1: Tensor, fc2: Tensor, bias2: Tensor) -> None:
    inner, width = block.fc1.weight.shape
    does = fc1.float().norm(dim=1) * fc2.float().norm(dim=0)
    kept = does.topk(min(inner, len(does))).indices.sort().values
    n, seen = len(kept), min(width, fc1.shape[1])
    block.fc1.weight[:n] = 0.0
    block.fc1.weight[:n, :seen] = fc1[kept, :seen].to(block.fc1.weight)
    block.fc1.bias[:n] = bias1[kept].to(block.fc1.bias)
    block.fc2.weight[:, :n] = fc2[:, kept].to(block.fc2.weight)
    block.fc2.bias.copy_(bias2)
