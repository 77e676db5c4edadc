"""Weights and rows in the forms that `layers.cpp` takes, and calls of it.

All tensors are on the CPU; what the C++ side holds are pointers into tensors that are kept here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.build import load_kernels
from engine.model.hadamard import turn

COLS = 16
"""Outputs that one vector of the kernels holds."""
PAIR = 32
"""Outputs that are computed together; outputs are padded to a multiple of it."""
P = ctypes.c_void_p


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", P), ("scale", P), ("offset", P), ("bias", P),
        ("n_in", ctypes.c_int32), ("n_out", ctypes.c_int32), ("block", ctypes.c_int32),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", P), ("post_norm", P),
        ("qkv", _Linear), ("o", _Linear), ("gate_up", _Linear), ("down", _Linear),
    )  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("hidden", "inner", "heads", "kv_heads", "head_dim")),
        ("eps", ctypes.c_float),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class PackedLinear:
    """A linear layer as the kernels read it."""

    weight: Tensor
    """int8 [out/32, in/4, 32, 4], or float32 [out/32, in, 32]."""
    scale: Tensor | None
    """float32 [out]; None for float weights."""
    offset: Tensor | None
    """int32 [out]: -128 times the sum of each output's weights, as inputs have 128 added."""
    bias: Tensor | None
    n_in: int
    n_out: int
    """Padded to 32."""
    block: int = 1
    """Inputs that are turned together, as in QuantizedLinear."""

    def rows(self, outputs: Tensor) -> Tensor:
        """The weights of some outputs, int64 [n] -> float32 [n, in]."""
        if self.scale is None:
            return self.weight[outputs // PAIR, :, outputs % PAIR]
        found = self.weight[outputs // PAIR, :, outputs % PAIR].flatten(1)
        return turn(found.float() * self.scale[outputs, None], self.block)

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        parts = (self.weight, self.scale, self.offset, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def struct(self) -> _Linear:
        """What C++ sees; valid as long as this object lives."""
        return _Linear(
            _pointer(self.weight), _pointer(self.scale), _pointer(self.offset),
            _pointer(self.bias), self.n_in, self.n_out, self.block,
        )  # fmt: skip


def pack(
    weight: Tensor, scale: Tensor | None, bias: Tensor | None = None, block: int = 1
) -> PackedLinear:
    """Lay out a linear layer: int8 [out, in] with float scales [out], or float [out, in].

    `block` is as QuantizedLinear has it. `in` is a multiple of 16, as widths of models are.
    """
    n_out, n_in = weight.shape
    if n_in % COLS:
        raise ValueError(f"{n_in} inputs are no multiple of {COLS}")
    extra = -n_out % PAIR
    if extra:
        weight = torch.cat([weight, weight.new_zeros(extra, n_in)])
        scale = None if scale is None else torch.cat([scale, scale.new_ones(extra)])
        bias = None if bias is None else torch.cat([bias, bias.new_zeros(extra)])
    rows = n_out + extra
    offset = None
    if scale is None:
        packed = weight.float().view(rows // PAIR, PAIR, n_in).transpose(1, 2).contiguous()
    else:
        packed = weight.view(rows // PAIR, PAIR, n_in // 4, 4).transpose(1, 2).contiguous()
        offset = weight.sum(dim=1, dtype=torch.int32) * -128
        scale = scale.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    return PackedLinear(packed, scale, offset, bias, n_in, rows, block)


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of both, 16 by 16 in turn, as the gated product takes them: [2 * inner, ...]."""
    shape = (len(gate) // COLS, COLS, *gate.shape[1:])
    return torch.stack([gate.view(shape), up.view(shape)], dim=1).flatten(0, 2)


@dataclass(frozen=True)
class PackedLayer:
    """A decoder layer: its norms float32 [hidden], and its products."""

    input_norm: Tensor
    post_norm: Tensor
    qkv: PackedLinear
    o: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear

    @property
    def nbytes(self) -> int:
        """Of its products."""
        return sum(product.nbytes for product in (self.qkv, self.o, self.gate_up, self.down))

    @property
    def struct(self) -> _Layer:
        """What C++ sees; valid as long as this object lives."""
        products = (self.qkv, self.o, self.gate_up, self.down)
        norms = (_pointer(self.input_norm), _pointer(self.post_norm))
        return _Layer(*norms, *(product.struct for product in products))


ROW = np.dtype(
    [
        ("k", np.uint64),
        ("v", np.uint64),
        ("layer", np.int64),
        ("head", np.int64),
        ("start", np.int32),
        ("place", np.int32),
        ("seen", np.int32),
        ("count", np.int32),
    ]
)
"""Where a row's keys and values are, as `struct Row` of layers.cpp tells it."""


class Kernels:
    """The compiled library with a pool of threads.

    Raises NoKernelsError where it cannot be had.
    """

    def __init__(self, threads: int) -> None:
        self._lib = load_kernels()
        self._lib.jupiter_pool.restype = P
        self._lib.jupiter_scratch.restype = ctypes.c_int64
        self._lib.jupiter_progress.restype = ctypes.c_int64
        self._lib.jupiter_norm.argtypes = (P, P, ctypes.c_float, ctypes.c_int, ctypes.c_int, P)
        self.threads = threads
        self._pool = P(self._lib.jupiter_pool(threads))
        self._scratch = torch.empty(0)
        self._rounded = torch.empty(0, dtype=torch.uint8)

    def __del__(self) -> None:
        if hasattr(self, "_pool"):
            self._lib.jupiter_pool_free(self._pool)

    def use(self, threads: int) -> None:
        """Compute with fewer threads from now on, or with all again."""
        self._lib.jupiter_pool_use(self._pool, threads)

    @property
    def progress(self) -> int:
        """Layers begun so far in this process."""
        return int(self._lib.jupiter_progress())

    def best(self, w: PackedLinear, x: Tensor, outputs: int) -> list[int]:
        """Of float32 [rows, in] each row's largest of the first `outputs` outputs."""
        x = x.contiguous()
        found = np.empty(len(x), np.int32)
        rounded, scales = self._rounding(w, len(x))
        self._lib.jupiter_best(
            self._pool, ctypes.byref(w.struct), P(x.data_ptr()), len(x), outputs,
            P(found.ctypes.data), rounded, scales,
        )  # fmt: skip
        return found.tolist()

    def top(self, x: Tensor, width: int, k: int) -> Tensor:
        """Places of the k largest of the first `width` values of each row, int32 [rows, k].

        x: float32 [rows, at least `width`], contiguous.
        """
        found = torch.empty(len(x), k, dtype=torch.int32)
        self._lib.jupiter_top(P(x.data_ptr()), len(x), width, x.shape[1], k, P(found.data_ptr()))
        return found

    def _rounding(self, w: PackedLinear, rows: int) -> tuple[P, P]:
        """Room for the rounded rows of an input, and for their scales."""
        room = rows * (w.n_in + 4)
        if len(self._rounded) < room:
            self._rounded = torch.empty(2 * room, dtype=torch.uint8)
        rounded = self._rounded.data_ptr()
        return P(rounded), P(rounded + rows * w.n_in)

    def linear(self, w: PackedLinear, x: Tensor) -> Tensor:
        """float32 [rows, in] -> [rows, padded out]."""
        return self.linears([w], x[None])[0]

    def linears(self, ws: Sequence[PackedLinear], x: Tensor) -> Tensor:
        """Several products of one shape: float32 [n, rows, in] -> [n, rows, padded out]."""
        first, rows = ws[0], x.shape[1]
        x = x.contiguous()
        out = torch.empty(len(ws), rows, first.n_out)
        rounded, scales = self._rounding(first, len(ws) * rows)
        structs = (_Linear * len(ws))(*(w.struct for w in ws))
        self._lib.jupiter_linears(
            self._pool, structs, len(ws), P(x.data_ptr()), rows, P(out.data_ptr()),
            rounded, scales,
        )  # fmt: skip
        return out

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm of float32 [rows, width]."""
        out = torch.empty_like(x)
        self._lib.jupiter_norm(
            x.data_ptr(), weight.data_ptr(), eps, len(x), x.shape[1], out.data_ptr()
        )
        return out


class NativeLayers:
    """Some decoder layers, run by one call."""

    def __init__(
        self,
        kernels: Kernels,
        layers: Sequence[PackedLayer],
        *,
        hidden: int,
        inner: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
    ) -> None:
        self._kernels, self._lib, self._layers = kernels, kernels._lib, list(layers)
        self._model = _Model(hidden, inner, heads, kv_heads, head_dim, eps)
        self._structs = (_Layer * len(layers))(*(layer.struct for layer in layers))

    def run(
        self,
        x: Tensor,
        cosine: Tensor,
        sine: Tensor,
        rows: NDArray[np.void],
        seen: NDArray[np.int32],
    ) -> None:
        """Pass x, float32 [rows, hidden], through the layers, in place.

        Args:
            cosine, sine: float32 [rows, head_dim / 2].
            rows: of dtype ROW.
            seen: for each row, from its `seen` on, `count` numbers of rows of its step.
        """
        keys = int((rows["start"] + rows["count"]).max())
        kernels = self._kernels
        size = self._lib.jupiter_scratch(
            ctypes.byref(self._model), len(rows), keys, kernels.threads
        )
        if kernels._scratch.nbytes < size:
            kernels._scratch = torch.empty(size // 2)  # twice as many bytes as needed
        self._lib.jupiter_layers(
            kernels._pool, ctypes.byref(self._model), self._structs, len(self._layers),
            P(x.data_ptr()), len(rows), P(cosine.data_ptr()), P(sine.data_ptr()),
            P(rows.ctypes.data), P(seen.ctypes.data), keys, P(kernels._scratch.data_ptr()),
        )  # fmt: skip
