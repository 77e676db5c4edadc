"""The least that a decode step can take here: its bytes and operations at the machine's speed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.model.config import ModelConfig
from engine.pipeline.stage import Stage
from engine.planning.memory import layer_shapes

STREAM_BYTES = 256 << 20
"""Far more than any cache holds, so that reading it is reading memory."""
PEAK_SIZE = 1024
"""Edge of the matrices whose product shows the peak; they stay in the cache."""
ROUNDS = 25


@dataclass(frozen=True)
class Speed:
    """What this machine can do with the threads that the bench uses."""

    bytes_per_s: float
    """Read from memory by a matrix-vector product, float32."""
    operations_per_s: float
    """Multiplications and additions of a square product, in the dtype of the weights."""
    kind: str
    """That dtype."""

    def best_of(self, other: Speed) -> Speed:
        """The higher of each figure of two measurements."""
        return Speed(
            max(self.bytes_per_s, other.bytes_per_s),
            max(self.operations_per_s, other.operations_per_s),
            self.kind,
        )


@dataclass(frozen=True)
class Work:
    """What a step reads and computes at least."""

    bytes: int
    operations: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.operations + other.operations)


def measure_speed(device: torch.device, dtype: torch.dtype, *, int8: bool) -> Speed:
    """The best of several rounds each: what else the machine does only slows it down."""
    columns = 4096
    matrix = torch.ones(STREAM_BYTES // 4 // columns, columns, device=device)
    vector = torch.ones(columns, device=device)
    stream = _best(lambda: torch.mv(matrix, vector), device)
    shape = (PEAK_SIZE, PEAK_SIZE)
    if int8:
        a = torch.ones(shape, dtype=torch.int8, device=device)
        # As `nn.Linear` keeps it, [out, in], and passes it: transposed.
        product = _best(lambda: torch._int_mm(a, a.t()), device)
    else:
        b = torch.ones(shape, dtype=dtype, device=device)
        product = _best(lambda: torch.mm(b, b.t()), device)
    kind = "int8" if int8 else str(dtype).removeprefix("torch.")
    return Speed(STREAM_BYTES / stream, 2 * PEAK_SIZE**3 / product, kind)


def _best(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def step_work(stage: Stage, rows: int, context: int) -> Work:
    """A whole model's decode step of `rows` tree nodes behind `context` tokens.

    Every weight is read once for all rows (`lm_head` a second time where heads draft with it),
    and so are the keys and values. Bytes are those that the weights have in memory.
    """
    model, config = stage.model, stage.model.config
    layer = sum(math.prod(s) for s in layer_shapes(config).values() if len(s) == 2)
    layers, count = len(model.model.layers), model.heads.num_heads
    head = config.vocab_size * config.hidden_size
    work = Work(stage.forward.packed_bytes, 2 * rows * (layers * layer + head))
    work += _attention(config, stage, layers, rows, context)
    work += Work(_stored(model.model.layers) + _stored(model.lm_head), 0)
    if count:
        own = sum(parameter.numel() for parameter in model.medusa_head.parameters())
        work += Work(_stored(model.medusa_head), 2 * own)
    if count and model.heads.vocab_size is None and model.draft_head is None:
        # Packed for the kernels it has a byte for each weight.
        again = _stored(model.lm_head) or head
        work += Work(again, 2 * count * head)
    return work


def _attention(config: ModelConfig, stage: Stage, layers: int, rows: int, context: int) -> Work:
    seen = context + rows
    keys = config.num_key_value_heads * config.head_dim
    queries = config.num_attention_heads * config.head_dim
    item = torch.empty(0, dtype=stage.dtype).element_size()
    return Work(2 * layers * seen * keys * item, 4 * layers * rows * seen * queries)


def _stored(module: torch.nn.Module) -> int:
    """Bytes of all its tensors; those that share memory count once."""
    tensors = [*module.parameters(), *module.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
