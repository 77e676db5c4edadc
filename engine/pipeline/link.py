"""One hop between stages: a small header of fixed layout, then one payload."""

from __future__ import annotations

from contextlib import nullcontext
from enum import IntEnum

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.pipeline.meter import StageMeter

HEADER_LENGTH = 4


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


class Link:
    """Point-to-point messages of one rank over torch.distributed (gloo or NCCL).

    Header, int64 [4]: kind, count of int64 numbers, rows of hidden states, free. Payload, uint8:
    the numbers, then the hidden states [rows, hidden_size]. No pickled objects, no collectives:
    a small send and receive costs about 40 µs. With gloo the tensors pass through host memory.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        nccl: bool = False,
        meter: StageMeter | None = None,
    ) -> None:
        """`meter`: what the sending thread's time is booked on."""
        self.meter = meter or StageMeter()
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.device = device
        self.wire = device if nccl else torch.device("cpu")
        self.row_bytes = hidden_size * dtype.itemsize
        self._incoming = (self._header(), self._buffer(1 << 16))
        # Two outgoing pairs: one is filled while the other is still being sent.
        self._outgoing = [(self._header(), self._buffer(1 << 16)) for _ in range(2)]
        self._sending: list[list[dist.Work]] = [[], []]
        self._turn = 0

    def beside(self) -> Link:
        """Another link of this rank, to receive with while a thread waits in this one's."""
        nccl = self.wire == self.device and self.device.type == "cuda"
        return Link(hidden_size=self.hidden_size, dtype=self.dtype, device=self.device, nccl=nccl)

    def send(
        self, to: int, kind: Kind, numbers: list[int] | None = None, hidden: Tensor | None = None
    ) -> None:
        """Send without waiting for the receiver; waits only for the message before the last.

        `hidden` is [rows, hidden_size] of the link's dtype.
        """
        with self.meter.during("link"):
            self._send(to, kind, numbers, hidden)

    def _send(self, to: int, kind: Kind, numbers: list[int] | None, hidden: Tensor | None) -> None:
        turn = self._turn = 1 - self._turn
        for work in self._sending[turn]:
            work.wait()
        numbers = numbers or []
        rows = 0 if hidden is None else len(hidden)
        split, size = len(numbers) * 8, len(numbers) * 8 + rows * self.row_bytes
        header, payload = self._outgoing[turn]
        if len(payload) < size:
            payload = self._buffer(2 * size)
            self._outgoing[turn] = (header, payload)
        header.copy_(torch.tensor([kind, len(numbers), rows, 0]))
        works = [dist.isend(header, to)]
        if size:
            if numbers:
                values = torch.from_numpy(np.array(numbers, dtype=np.int64))
                payload[:split].view(torch.int64).copy_(values)
            if hidden is not None:
                target = payload[split:size].view(self.dtype).view(rows, self.hidden_size)
                target.copy_(hidden)
            works.append(dist.isend(payload[:size], to))
        self._sending[turn] = [work for work in works if work is not None]
        self.meter.moved += 1

    def receive(
        self, source: int, meter: StageMeter | None = None
    ) -> tuple[Kind, list[int], Tensor]:
        """Wait for the next message of `source`.

        With a `meter` what follows the header counts as time of the link; until the header is
        there, the caller's own activity goes on.

        Returns its kind, its numbers, and its hidden states on the device (valid until the next
        receive). Raises RuntimeError when the peer is gone or the group's timeout has passed.
        """
        header, _ = self._incoming
        dist.recv(header, source)
        self.meter.moved += 1
        kind, count, rows, _ = header.tolist()
        with nullcontext() if meter is None else meter.during("link"):
            return Kind(kind), *self._payload(source, count, rows)

    def _payload(self, source: int, count: int, rows: int) -> tuple[list[int], Tensor]:
        header, payload = self._incoming
        split, size = count * 8, count * 8 + rows * self.row_bytes
        if len(payload) < size:
            payload = self._buffer(2 * size)
            self._incoming = (header, payload)
        if size:
            dist.recv(payload[:size], source)
        numbers = payload[:split].view(torch.int64).tolist()
        hidden = payload[split:size].view(self.dtype).view(rows, self.hidden_size)
        return numbers, hidden.to(self.device)

    def flush(self) -> None:
        """Wait until everything sent has left."""
        for works in self._sending:
            for work in works:
                work.wait()
            works.clear()

    def _header(self) -> Tensor:
        return torch.zeros(HEADER_LENGTH, dtype=torch.int64, device=self.wire)

    def _buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.wire)
