"""One hop between stages: one message, or two where it is large."""

from __future__ import annotations

import ctypes
import struct
from contextlib import nullcontext
from enum import IntEnum
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.pipeline.meter import StageMeter
from engine.pipeline.wire import LinkDtype, Wire

HEADER_LENGTH = 4
HEADER_BYTES = 8 * HEADER_LENGTH
FIRST_BYTES = 1 << 16
"""Room for a first message: what fits there whole needs no second one."""
FIRST_BYTES_NCCL = 1 << 14
"""NCCL sends and receives the same size, so that is always sent."""
VIEWS = 256
"""Of a message's parts that are kept, for sizes that come again."""


class Kind(IntEnum):
    """What a message is for."""

    BATCH = 1
    RESULTS = 2
    TICK = 3
    """Goes round all stages when there is nothing else, so that no receive times out."""
    STOP = 4
    BEGIN = 5
    """Goes round once: what came before was no request's."""
    MEASURE = 6
    """An order to measure stages or links, or an answer to one; see engine/planning/profiler.py."""
    RESPLIT = 7
    """Goes round once: all layers are shared out anew, as the numbers say."""


class Link:
    """Point-to-point messages of one rank over torch.distributed (gloo or NCCL).

    A message: header, int64 [4]: kind, count of int64 numbers, rows of hidden states, free; then
    the numbers; then the hidden states [rows, hidden_size]. A decode step is a few kilobytes and
    leaves as one; where all of it is too long, the header comes alone and the rest behind it. With
    gloo a receive takes whatever shorter message comes. No pickled objects, no collectives: with
    gloo the tensors pass through host memory.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        nccl: bool = False,
        meter: StageMeter | None = None,
        link_dtype: LinkDtype = "exact",
    ) -> None:
        """`meter`: what the sending thread's time is booked on; `link_dtype`: see Wire."""
        self.meter = meter or StageMeter()
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.device = device
        self._nccl = nccl
        group = dist.group.WORLD
        assert group is not None
        # The backend itself: torch's dispatcher takes its time to find it for every message.
        self._peers: Any = group._get_backend(device)
        self.first_bytes = FIRST_BYTES_NCCL if nccl else FIRST_BYTES
        self.form = Wire(link_dtype, hidden_size, dtype)
        self._incoming = _Buffer(self.first_bytes)
        # Two outgoing ones: one is filled while the other is still being sent.
        self._outgoing = [_Buffer(self.first_bytes) for _ in range(2)]
        self._sending: list[list[dist.Work]] = [[], []]
        self._turn = 0

    def beside(self) -> Link:
        """Another link of this rank, to receive with while a thread waits in this one's."""
        return Link(
            hidden_size=self.hidden_size,
            dtype=self.dtype,
            device=self.device,
            nccl=self._nccl,
            link_dtype=self.form.kind,
        )

    def send(
        self, to: int, kind: Kind, numbers: list[int] | None = None, hidden: Tensor | None = None
    ) -> None:
        """Send without waiting for the receiver; waits only for the message before the last.

        `hidden` is [rows, hidden_size] of the link's dtype.
        """
        with self.meter.during("link"):
            self._send(to, kind, numbers or [], hidden)

    def _send(self, to: int, kind: Kind, numbers: list[int], hidden: Tensor | None) -> None:
        turn = self._turn = 1 - self._turn
        for work in self._sending[turn]:
            work.wait()
        rows = 0 if hidden is None else len(hidden)
        split = HEADER_BYTES + 8 * len(numbers)
        size = split + rows * self.form.row_bytes
        out = self._outgoing[turn]
        out.make_room(size)
        out.put_numbers((kind, len(numbers), rows, 0, *numbers))
        if hidden is not None and self.form.kind == "exact":
            out.put_rows(split, hidden)
        elif hidden is not None:
            self.form.put(hidden, out.part(split, size))
        if size <= self.first_bytes:
            parts = [out.part(0, self.first_bytes if self._nccl else size)]
        else:
            parts = [out.part(0, self.first_bytes if self._nccl else HEADER_BYTES)]
            parts.append(out.part(HEADER_BYTES, size))
        self._sending[turn] = [self._peers.send([self._on_wire(part)], to, 0) for part in parts]
        self.meter.moved += 1
        self.meter.sent_bytes += sum(map(len, parts))

    def receive(
        self, source: int, meter: StageMeter | None = None
    ) -> tuple[Kind, list[int], Tensor]:
        """Wait for the next message of `source`.

        With a `meter` what follows the first part counts as time of the link; until that is there,
        the caller's own activity goes on.

        Returns its kind, its numbers, and its hidden states on the device (valid until the next
        receive). Raises RuntimeError when the peer is gone or the group's timeout has passed.
        """
        self._receive(source, 0, self.first_bytes)
        self.meter.moved += 1
        kind, count, rows, _ = self._incoming.numbers(0, HEADER_LENGTH)
        with nullcontext() if meter is None else meter.during("link"):
            split = HEADER_BYTES + 8 * count
            size = split + rows * self.form.row_bytes
            if size > self.first_bytes:
                self._incoming.make_room(size)
                self._receive(source, HEADER_BYTES, size)
            numbers = self._incoming.numbers(HEADER_BYTES, count)
            if self.form.kind == "exact":
                hidden = self._incoming.rows(split, rows, self.hidden_size, self.dtype)
            else:
                hidden = self.form.take(self._incoming.part(split, size), rows)
            if self.device.type != "cpu":
                hidden = hidden.to(self.device)
            return Kind(kind), list(numbers), hidden

    def _receive(self, source: int, start: int, end: int) -> None:
        part = self._incoming.part(start, end)
        wire = self._on_wire(part)
        self._peers.recv([wire], source, 0).wait()
        if wire is not part:
            part.copy_(wire)

    def _on_wire(self, part: Tensor) -> Tensor:
        return part.to(self.device) if self._nccl else part

    def flush(self) -> None:
        """Wait until everything sent has left."""
        for works in self._sending:
            for work in works:
                work.wait()
            works.clear()


class _Buffer:
    """Host memory for one message; written and read without torch where that is quicker."""

    def __init__(self, size: int) -> None:
        self._bytes = torch.zeros(size, dtype=torch.uint8)
        self._view = self._bytes.numpy().data
        # Making a view costs tens of microseconds behind kernels that have emptied the caches.
        self._parts = lru_cache(VIEWS)(lambda start, end: self._bytes[start:end])
        self._rows = lru_cache(VIEWS)(self._view_of_rows)

    def make_room(self, size: int) -> None:
        """What was there is lost where it has to grow."""
        if len(self._bytes) < size:
            self.__init__(2 * size)  # type: ignore[misc]

    def part(self, start: int, end: int) -> Tensor:
        return self._parts(start, end)

    def put_numbers(self, numbers: tuple[int, ...]) -> None:
        """int64, from the beginning on."""
        struct.pack_into(f"<{len(numbers)}q", self._view, 0, *numbers)

    def numbers(self, start: int, count: int) -> tuple[int, ...]:
        return struct.unpack_from(f"<{count}q", self._view, start)

    def put_rows(self, start: int, rows: Tensor) -> None:
        if rows.device.type == "cpu" and rows.is_contiguous():
            ctypes.memmove(self._bytes.data_ptr() + start, rows.data_ptr(), rows.nbytes)
        else:
            self.rows(start, rows.shape[0], rows.shape[1], rows.dtype).copy_(rows)

    def rows(self, start: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return self._rows(start, rows, width, dtype)

    def _view_of_rows(self, start: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        size = rows * width * dtype.itemsize
        return self._bytes[start : start + size].view(dtype).view(rows, width)
