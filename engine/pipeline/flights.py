"""What enters the pipeline next: prefill chunks and decode steps, as micro-batches."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from engine.decoding.tree import Tree
from engine.decoding.tuner import Drafting
from engine.pipeline.batch import Entry, Judge
from engine.pipeline.sequence import Sequence as Running

MIN_SHARED_ROWS = 32
"""Where stages share one machine's cores, a decode step of fewer rows is not cut in two: each part
would read all weights again, and take as long as the whole."""


@dataclass
class Flight:
    """A micro-batch on its way through the stages."""

    entries: list[Entry]
    sequences: list[Running]
    tree: Tree | None = None
    """Of a decode step."""
    crowd: int = 1
    """Stages that are at work at a time, with this one and with others."""
    began: float = 0.0
    alone: bool = True
    """No other flight was under way meanwhile."""


class Composer:
    """Chooses the next micro-batch; holds no sequence of its own.

    Several are under way at a time, so that every stage works: at most one for each stage, and one
    on its way. Decode steps are cut into as many groups as there are stages, where these are not
    the same machine's, and a sequence joins the first group that comes back when it is ready, the
    one that has waited longest first.
    """

    def __init__(self, drafting: Drafting, *, stages: int, shared: bool, longest: int) -> None:
        """Set up.

        Args:
            drafting: where the trees are from.
            stages: of the pipeline.
            shared: the stages compute on the same cores.
            longest: rows of a prefill micro-batch at most.
        """
        self.drafting = drafting
        self._stages, self._shared, self._longest = stages, shared, longest
        self._most = stages + 1 if stages > 1 else 1
        self._prefill_next = True

    def next(self, running: Iterable[Running], flights: Collection[Flight]) -> Flight | None:
        """The next micro-batch, None where there is nothing to send or no room for it.

        Prefill chunks and decode steps take turns where both wait, so neither starves.
        """
        if len(flights) >= self._most:
            return None
        running = list(running)
        flight = self._choose(running, flights)
        if flight is not None:
            more = len(flights) + 1 + self._waits(running)
            flight.crowd = min(self._stages, more)
        return flight

    def _choose(self, running: Sequence[Running], flights: Collection[Flight]) -> Flight | None:
        prefill = [s for s in running if s.fed < s.begun and s.finish_reason is None]
        decode = self._group(running, flights)
        if prefill and (self._prefill_next or not decode):
            self._prefill_next = False
            return self._prefill(prefill)
        if decode:
            self._prefill_next = True
            tree = self.drafting.step(len(decode))
            return Flight([self._decode_entry(s, tree) for s in decode], decode, tree)
        return None

    @staticmethod
    def _waits(running: Iterable[Running]) -> bool:
        """Whether another micro-batch could follow at once."""
        return any(s.chunks or s.ready_to_decode for s in running if s.finish_reason is None)

    def _group(self, running: Sequence[Running], flights: Collection[Flight]) -> list[Running]:
        """The sequences of the next decode step, those first that wait longest."""
        ready = [s for s in running if s.ready_to_decode]
        flying = [len(flight.sequences) for flight in flights if flight.tree is not None]
        sequences = len(ready) + sum(flying)
        groups = self._groups(sequences)
        if not ready or len(flying) >= groups:
            return []
        ready.sort(key=lambda s: s.last_token_at or 0.0)
        return ready[: math.ceil(sequences / groups)]

    def _groups(self, sequences: int) -> int:
        if not self._shared:
            return self._stages
        rows = sequences * self.drafting.tree.size
        return max(1, min(self._stages, rows // MIN_SHARED_ROWS))

    def _prefill(self, sequences: Iterable[Running]) -> Flight:
        flight = Flight([], [])
        room = self._longest
        for sequence in sequences:
            if room == 0:
                break
            start, n = sequence.fed, min(sequence.chunks[0], room)
            last = start + n == sequence.begun
            entry = self._entry(sequence, sequence.tokens[start : start + n], range(-1, n - 1))
            entry.judge = Judge.LAST if last else Judge.NONE
            sequence.sent(n)
            room -= n
            if last:
                sequence.slot.hold(sequence.tokens[: sequence.begun])
            flight.entries.append(entry)
            flight.sequences.append(sequence)
        return flight

    def _decode_entry(self, sequence: Running, tree: Tree) -> Entry:
        # While another tree was in use, nothing was drafted for it, or by fewer heads.
        sequence.tree = tree = sequence.drafted.cut(tree)
        tokens = sequence.drafted.tokens(tree, sequence.tokens[-1])
        entry = self._entry(sequence, tokens, tree.parents)
        entry.judge = Judge.TREE
        sequence.in_flight = True
        return entry

    def _entry(self, sequence: Running, tokens: list[int], parents: Iterable[int]) -> Entry:
        entry = Entry(
            slot=sequence.slot.index,
            start=sequence.fed,
            tokens=tokens,
            parents=list(parents),
            judge=Judge.NONE,
            keep=sequence.keep,
            keep_to=sequence.keep_to,
            draft_width=self.drafting.width,
            draft_heads=self.drafting.heads,
            draft_tree=self.drafting.along,
            rule=sequence.rule,
            point=sequence.point,
        )
        sequence.keep = []
        return entry
