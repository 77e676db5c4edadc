"""Tensor parallelism of the same model, for comparison: Megatron's cut, two sums a layer.

Each rank has its part of the heads and of the MLP's inner width (columns of q, k, v, gate and up,
rows of o and down), the whole embedding and `lm_head`; after o and down all ranks sum up. Weights
and sums are float32, there is a KV cache and no speculation. (Shoeybi et al. 2019)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.bench.network.tensor_shape import check_cut
from engine.model.llama import LlamaDecoderLayer
from engine.model.medusa import MedusaLlamaForCausalLM
from engine.pipeline.batch import Entry, Judge
from engine.pipeline.stage import Stage


def cut(model: MedusaLlamaForCausalLM, rank: int, world: int) -> None:
    """Keep a rank's part of every decoder layer of a whole model with unfused projections."""
    config = model.config
    check_cut(config, world)
    model.config = replace(
        config,
        num_attention_heads=config.num_attention_heads // world,
        num_key_value_heads=config.num_key_value_heads // world,
        head_dim=config.head_dim,
    )
    for layer in model.model.layers:
        assert isinstance(layer, LlamaDecoderLayer)
        attention, mlp = layer.self_attn, layer.mlp
        attention.num_heads //= world
        attention.num_kv_heads //= world
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            _keep(linear, rank, world, 0)
        for linear in (mlp.gate_proj, mlp.up_proj):
            _keep(linear, rank, world, 0)
        for linear in (attention.o_proj, mlp.down_proj):
            _keep(linear, rank, world, 1)
            linear.register_forward_hook(_sum_up)


def _keep(linear: nn.Linear, rank: int, world: int, dim: int) -> None:
    part = linear.weight.chunk(world, dim)[rank].contiguous()
    linear.weight = nn.Parameter(part, requires_grad=False)


def _sum_up(_: nn.Module, __: object, out: Tensor) -> Tensor:
    dist.all_reduce(out)
    return out


class TensorParallel:
    """One rank; all of them do the same."""

    def __init__(self, stage: Stage, rank: int) -> None:
        self.stage, self.rank = stage, rank

    def answer(self, prompt: Sequence[int], max_tokens: int, stops: frozenset[int]) -> list[int]:
        """Greedy tokens, on rank 0."""
        length = torch.tensor([len(prompt), max_tokens])
        dist.broadcast(length, 0)
        dist.broadcast(torch.tensor(prompt), 0)
        return self._generate(list(prompt), max_tokens, stops)

    def serve(self, stops: frozenset[int]) -> None:
        """Every other rank's part, until rank 0 ends."""
        while True:
            length = torch.zeros(2, dtype=torch.int64)
            dist.broadcast(length, 0)
            count, max_tokens = (int(number) for number in length)
            if count == 0:
                return
            prompt = torch.zeros(count, dtype=torch.int64)
            dist.broadcast(prompt, 0)
            self._generate([int(token) for token in prompt], max_tokens, stops)

    def end(self) -> None:
        """Let the others leave, on rank 0."""
        dist.broadcast(torch.zeros(2, dtype=torch.int64), 0)

    def _generate(self, prompt: list[int], max_tokens: int, stops: frozenset[int]) -> list[int]:
        # Sums are the same to the bit on all ranks, and so is what follows from them.
        entry = Entry(0, 0, prompt, list(range(-1, len(prompt) - 1)), Judge.LAST)
        tokens: list[int] = []
        while True:
            (result,) = self.stage.judge([entry], self.stage.run([entry], None))
            tokens.append(result.next_token)
            if len(tokens) == max_tokens or result.next_token in stops:
                return tokens
            fed = len(prompt) + len(tokens) - 1
            entry = Entry(0, fed, [result.next_token], [-1], Judge.TREE)
