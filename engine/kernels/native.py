"""Weights and rows in the forms that `layers.cpp` takes, and calls of it.

All tensors are on the CPU; what the C++ side holds are pointers into tensors that are kept here.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from engine.decoding.tree import Tree
from engine.kernels.arena import Arena
from engine.kernels.build import load_kernels
from engine.model.hadamard import turn

COLS = 16
"""Outputs that one vector of the kernels holds."""
PAIR = 32
"""Outputs that are computed together; outputs are padded to a multiple of it."""
P = ctypes.c_void_p
I32, I64, F32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", P), ("scale", P), ("bias", P), ("n_in", I32), ("n_out", I32), ("block", I32),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", P), ("post_norm", P),
        ("qkv", _Linear), ("o", _Linear), ("gate_up", _Linear), ("down", _Linear),
    )  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = (
        ("hidden", I32), ("inner", I32), ("heads", I32), ("kv_heads", I32), ("head_dim", I32),
        ("eps", F32), ("embedding", P), ("final_norm", P),
    )  # fmt: skip


class _Heads(ctypes.Structure):
    _fields_ = (
        ("hidden", I32), ("count", I32), ("blocks", I32), ("width", I32),
        ("fc1", P), ("fc2", P), ("linear", P), ("output", P), ("own_output", I32),
        ("tokens", P), ("embedding", P), ("tied", P),
    )  # fmt: skip


class _Along(ctypes.Structure):
    _fields_ = (("levels", I32), ("nodes", I32), ("sizes", P), ("parents", P), ("ranks", P))


class EntryRows(ctypes.Structure):
    """Rows of one sequence in a step: `struct Entry` of layers.cpp."""

    _fields_ = (
        ("k", P), ("v", P), ("layer", I64), ("head", I64),
        ("start", I32), ("rows", I32), ("keep_to", I32), ("kept", I32),
    )  # fmt: skip


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _numbers(values: Sequence[int]) -> array[int]:
    """int32, as C++ reads them."""
    return array("i", values)


def _at(numbers: array[int]) -> int:
    return numbers.buffer_info()[0]


# Declared, ctypes takes addresses as plain numbers, without an object for each.
_ARGUMENTS = {
    "jupiter_pool": (I32,),
    "jupiter_pool_use": (P, I32),
    "jupiter_pool_free": (P,),
    "jupiter_progress": (),
    "jupiter_layers_scratch": (P, P, I32, I32),
    "jupiter_layers": (P, P, P, I32, P, I32, P, P, P, P, P, P, I32, P),
    "jupiter_linear": (P, P, P, I32, P, I32),
    "jupiter_best": (P, P, P, I32, I32, P, I32),
    "jupiter_judge": (P, P, I32, P, I32, P, P, P, I32, P, P, I32, I32, P, P, P, P),
    "jupiter_draft": (P, P, I32, P, P, P, I32, I32, P),
    "jupiter_guess": (P, P, I32, P, P, I32, I32, P),
}


@dataclass(frozen=True)
class PackedLinear:
    """A linear layer as the kernels read it."""

    weight: Tensor
    """uint8 [out/32, in/4, 32, 4]: int8 with 128 added."""
    scale: Tensor
    """float32 [out]."""
    bias: Tensor | None
    n_in: int
    n_out: int
    """Padded to 32."""
    block: int = 1
    """Inputs that are turned together, as in QuantizedLinear."""

    def rows(self, outputs: Tensor) -> Tensor:
        """The weights of some outputs, int64 [n] -> float32 [n, in]."""
        found = self.weight[outputs // PAIR, :, outputs % PAIR].flatten(1)
        return turn((found.float() - 128) * self.scale[outputs, None], self.block)

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        parts = (self.weight, self.scale, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def struct(self) -> _Linear:
        """What C++ sees; valid as long as this object lives."""
        parts = (_pointer(self.weight), _pointer(self.scale), _pointer(self.bias))
        return _Linear(*parts, self.n_in, self.n_out, self.block)


def pack(
    weight: Tensor, scale: Tensor, bias: Tensor | None = None, block: int = 1, *, arena: Arena
) -> PackedLinear:
    """Lay out a linear layer: int8 [out, in] with float scales [out].

    `block` is as QuantizedLinear has it. `in` is a multiple of 16, as widths of models are.
    """
    n_out, n_in = weight.shape
    if n_in % COLS:
        raise ValueError(f"{n_in} inputs are no multiple of {COLS}")
    extra = -n_out % PAIR
    if extra:
        weight = torch.cat([weight, weight.new_zeros(extra, n_in)])
        scale = torch.cat([scale, scale.new_ones(extra)])
        bias = None if bias is None else torch.cat([bias, bias.new_zeros(extra)])
    rows = n_out + extra
    raised = weight.view(torch.uint8) ^ 128  # as if 128 were added to the signed values
    packed = arena.keep(raised.view(rows // PAIR, PAIR, n_in // 4, 4).transpose(1, 2))
    bias = None if bias is None else arena.keep(bias.float())
    return PackedLinear(packed, arena.keep(scale.float()), bias, n_in, rows, block)


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


class Kernels:
    """The compiled library with a pool of threads.

    Calls take `more`: another one comes in a moment, and the threads wait for it awake.
    Raises NoKernelsError where the library cannot be had.
    """

    def __init__(self, threads: int) -> None:
        self.lib = load_kernels()
        for name, arguments in _ARGUMENTS.items():
            getattr(self.lib, name).argtypes = arguments
        self.lib.jupiter_pool.restype = P
        self.lib.jupiter_layers_scratch.restype = self.lib.jupiter_progress.restype = I64
        self.pool = self.lib.jupiter_pool(threads)

    def __del__(self) -> None:
        if hasattr(self, "pool"):
            self.lib.jupiter_pool_free(self.pool)

    def use(self, threads: int) -> None:
        """Compute with fewer threads from now on, or with all again."""
        self.lib.jupiter_pool_use(self.pool, threads)

    @property
    def progress(self) -> int:
        """Layers begun so far in this process."""
        return int(self.lib.jupiter_progress())

    def best(self, w: PackedLinear, x: Tensor, outputs: int, *, more: bool = False) -> list[int]:
        """Of float32 [rows, in] each row's largest of the first `outputs` outputs."""
        x = x.contiguous()
        found = _numbers([0] * len(x))
        self.lib.jupiter_best(
            self.pool, ctypes.byref(w.struct), x.data_ptr(), len(x), outputs, _at(found), more
        )
        return found.tolist()

    def linear(self, w: PackedLinear, x: Tensor, *, more: bool = False) -> Tensor:
        """float32 [rows, in] -> [rows, padded out]."""
        x = x.contiguous()
        out = torch.empty(len(x), w.n_out)
        self.lib.jupiter_linear(
            self.pool, ctypes.byref(w.struct), x.data_ptr(), len(x), out.data_ptr(), more
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
        embedding: Tensor | None,
        final_norm: Tensor | None,
    ) -> None:
        """embedding: float32 [vocabulary, hidden], on the first stage; final_norm: float32
        [hidden], on the last one."""
        self._kernels, self._kept = kernels, (list(layers), embedding, final_norm)
        self._model = _Model(
            hidden, inner, heads, kv_heads, head_dim, eps, _pointer(embedding), _pointer(final_norm)
        )
        self._structs = (_Layer * len(layers))(*(layer.struct for layer in layers))
        self._at_model = ctypes.addressof(self._model)
        self._count, self._hidden = len(layers), hidden
        self.scratch = torch.empty(0)
        self._room = (0, 0)

    def run(
        self,
        x: Tensor | Sequence[int],
        entries: ctypes.Array[EntryRows],
        parents: Sequence[int],
        keep: Sequence[int],
        keys: int,
        cosine: Tensor,
        sine: Tensor,
        *,
        more: bool = False,
    ) -> Tensor:
        """Move KV rows, then pass new rows through the layers: float32 [rows, hidden].

        Args:
            x: hidden states float32 [rows, hidden], or tokens.
            parents: of all entries' rows, as Entry has them.
            keep: of all entries.
            keys: at least as many as any row sees.
            cosine, sine: float32 [positions, head_dim / 2].
        """
        rows, lib, kernels = len(parents), self._kernels.lib, self._kernels
        tokens = None
        if isinstance(x, Tensor):
            out = x.clone()
        else:
            tokens, out = _numbers(x), torch.empty(rows, self._hidden)
        if rows > self._room[0] or keys > self._room[1]:
            self._make_room(rows, keys)
        numbers, kept = _numbers(parents), _numbers(keep)
        lib.jupiter_layers(
            kernels.pool, self._at_model, self._structs, self._count,
            entries, len(entries), _at(numbers), _at(kept), None if tokens is None else _at(tokens),
            out.data_ptr(), cosine.data_ptr(), sine.data_ptr(), more,
            self.scratch.data_ptr(),
        )  # fmt: skip
        return out

    def _make_room(self, rows: int, keys: int) -> None:
        self._room = rows, keys = max(rows, self._room[0]), 2 * max(keys, self._room[1])
        kernels = self._kernels
        size = kernels.lib.jupiter_layers_scratch(kernels.pool, self._at_model, rows, keys)
        self.scratch = torch.empty(size // 4 + 1)


@dataclass(frozen=True)
class HeadParts:
    """The heads' products; lists are by block, then by head."""

    blocks: Sequence[Sequence[PackedLinear]]
    """Of ResBlocks, behind a root block where there is one."""
    fc1: Sequence[PackedLinear]
    fc2: Sequence[PackedLinear]
    """Of root blocks, or empty."""
    outputs: Sequence[PackedLinear]
    """One each, or one for all."""
    own_output: bool
    width: int
    """Tokens that are drafted from."""
    tokens: Sequence[int] | None
    """Which ones, where they are not all in order."""
    embedding: Tensor | None
    """float32 [vocabulary, hidden], or None where it is that of `lm_head`."""


class NativeHeads:
    """The end of a step on the last stage, in one call: likeliest tokens, acceptance, drafting."""

    def __init__(
        self, kernels: Kernels, lm_head: PackedLinear, vocabulary: int, count: int, parts: HeadParts
    ) -> None:
        self._kernels, self._lm_head, self._vocabulary = kernels, lm_head.struct, vocabulary
        self._tokens = None if parts.tokens is None else _numbers(parts.tokens)
        lists = [parts.fc1, parts.fc2, [w for each in parts.blocks for w in each], parts.outputs]
        self._arrays = [(_Linear * len(each))(*(w.struct for w in each)) for each in lists]
        self._kept = (lm_head, parts)
        fc1, fc2, linear, output = (
            ctypes.cast(each, P) if len(each) else None for each in self._arrays
        )
        self._heads = _Heads(
            lm_head.n_in, count, len(parts.blocks), parts.width, fc1, fc2, linear, output,
            parts.own_output, None if self._tokens is None else _at(self._tokens),
            _pointer(parts.embedding), ctypes.addressof(self._lm_head),
        )  # fmt: skip
        self._at_lm_head = ctypes.addressof(self._lm_head)
        self._at_heads = ctypes.addressof(self._heads)

    def judge(
        self,
        x: Tensor,
        sizes: Sequence[int],
        tokens: Sequence[int],
        parents: Sequence[int],
        *,
        first_nodes: int,
        k: int,
        heads: int,
        along: Tree | None,
    ) -> list[tuple[list[int], int, list[list[int]]]]:
        """Each tree's accepted path, the token that follows, and k candidates of some heads.

        Args:
            x: normed hidden states of all trees' nodes, float32 [nodes, hidden].
            sizes: nodes of each tree; tokens, parents: of all of them.
            first_nodes: of each tree that are looked at in any case.
            k: 0 for no drafting.
            along: the tree of sequential heads, which draft at each of its inner nodes.
        """
        along = along if k else None
        lists = len(along.inner) if along else heads
        n = len(sizes)
        path, lengths = _numbers([0] * len(tokens)), _numbers([0] * n)
        after, drafted = _numbers([0] * n), _numbers([0] * (n * lists * k))
        numbers = [_numbers(each) for each in (sizes, tokens, parents)]
        self._kernels.lib.jupiter_judge(
            self._kernels.pool, self._at_lm_head, self._vocabulary,
            self._at_heads, heads, _along(along), x.data_ptr(), _at(numbers[0]), n,
            _at(numbers[1]), _at(numbers[2]), first_nodes, k,
            _at(path), _at(lengths), _at(after), _at(drafted),
        )  # fmt: skip
        found, at = [], 0
        for i, size in enumerate(sizes):
            own = drafted[i * lists * k : (i + 1) * lists * k].tolist()
            candidates = [own[place * k : (place + 1) * k] for place in range(lists)]
            found.append((path[at : at + lengths[i]].tolist(), after[i], candidates if k else []))
            at += size
        return found

    def draft(
        self, ends: Tensor, roots: Sequence[int], k: int, heads: int, along: Tree | None
    ) -> Tensor:
        """The k likeliest tokens of some heads: float32 [n, hidden] -> int32 [n, lists, k].

        There is a list for each head, or of sequential heads for each inner node of `along`.
        """
        lists = len(along.inner) if along else heads
        ends, numbers = ends.contiguous(), _numbers(roots)
        out = torch.empty(len(ends), lists, k, dtype=torch.int32)
        self._kernels.lib.jupiter_draft(
            self._kernels.pool, self._at_heads, heads, _along(along), ends.data_ptr(),
            _at(numbers), len(ends), k, out.data_ptr(),
        )  # fmt: skip
        return out

    def guess(self, head: int, ends: Tensor, known: Tensor, k: int) -> Tensor:
        """One head's k likeliest tokens behind given ones, int32 [n, k].

        Args:
            ends: float32 [n, hidden].
            known: [n, tokens that the head sees].
        """
        ends, known = ends.contiguous(), known.int().contiguous()
        out = torch.empty(len(ends), k, dtype=torch.int32)
        self._kernels.lib.jupiter_guess(
            self._kernels.pool, self._at_heads, head, ends.data_ptr(), known.data_ptr(),
            len(ends), k, out.data_ptr(),
        )  # fmt: skip
        return out


@lru_cache(maxsize=64)
def _levels(tree: Tree) -> tuple[_Along, list[array[int]]]:
    levels = tree.levels
    arrays = [
        _numbers([len(level.ranks) for level in levels]),
        _numbers([parent for level in levels for parent in level.parents]),
        _numbers([rank for level in levels for rank in level.ranks]),
    ]
    return _Along(len(levels), len(tree.inner), *(_at(each) for each in arrays)), arrays


def _along(tree: Tree | None) -> int | None:
    """Where C++ reads the tree, which is kept for some time; null for none."""
    return None if tree is None else ctypes.addressof(_levels(tree)[0])
