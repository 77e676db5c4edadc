"""One stage at work: its layers, its KV caches, and on the last stage the judging of results."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from engine.decoding.accept import accept
from engine.decoding.tree import MAX_NODES
from engine.model.kv_cache import KVStore
from engine.model.medusa import MedusaLlamaForCausalLM
from engine.pipeline.batch import (
    Entry,
    Judge,
    Result,
    crowd_of,
    decode_batch,
    encode_results,
    row_slices,
)
from engine.pipeline.forward import Forward, ModuleForward
from engine.pipeline.link import Kind, Link
from engine.pipeline.meter import Activity, StageMeter
from engine.pipeline.scores import NodeScores, look_ahead
from engine.planning.profiler import Profiler


class Stage:
    """The modules and KV caches of one rank."""

    def __init__(
        self,
        model: MedusaLlamaForCausalLM,
        *,
        first: bool,
        last: bool,
        context_length: int,
        dtype: torch.dtype,
        device: torch.device,
        forward: Forward | None = None,
        neighbours: int = 1,
    ) -> None:
        """`neighbours`: stages whose cores are this one's, itself included."""
        self.model = model
        self.first, self.last = first, last
        self.dtype, self.device = dtype, device
        self.forward = forward or ModuleForward(model, dtype, device)
        config = model.config
        self.store = KVStore(
            len(model.model.layers),
            config.num_key_value_heads,
            context_length + MAX_NODES,
            config.head_dim,
            dtype=dtype,
            device=device,
        )
        self.meter = StageMeter()
        self.kv_rows: int | None = None
        """Of all sequences together, that there is memory for; None until that was measured."""
        self.neighbours = neighbours
        self._threads = self._all_threads = self.forward.threads
        self._uncounted: list[Callable[[], None]] = []
        self.patience_s = 0.0
        """A layer that takes longer hangs; see StageTelemetry."""

    def share(self, crowd: int) -> None:
        """Use as many threads as leave cores for the others while `crowd` stages are at work."""
        threads = max(1, self._all_threads // min(crowd, self.neighbours))
        if threads != self._threads:
            self._threads = threads
            self.forward.use_threads(threads)

    def run(self, entries: Sequence[Entry], hidden: Tensor | None) -> Tensor:
        """Pass a micro-batch through this stage's layers.

        `hidden` is [rows, hidden_size] from the stage before (None on the first, which starts
        from the entries' tokens); returns the hidden states of the same rows.
        """
        self.settle()
        began = time.perf_counter()
        for copy in (copy for entry in entries for copy in entry.copies):
            self.store.copy(*copy)
        tokens = [t for e in entries for t in e.tokens] if hidden is None else hidden
        out = self.forward.layers(tokens, entries, self.store)
        if self.device.type == "cuda":
            # A kernel runs on after its call: without this the link would be blamed for its time.
            torch.cuda.synchronize(self.device)
        if not self.meter.is_muted:
            ended = time.perf_counter()
            self._uncounted.append(partial(_count, self.meter, entries, began, ended))
        return out

    def settle(self) -> None:
        """Count what was computed: best when others are at work, since it delays no step then."""
        for count in self._uncounted:
            count()
        self._uncounted.clear()

    def judge(self, entries: Sequence[Entry], hidden: Tensor) -> list[Result]:
        """Results of the entries that want one, in order; only on the last stage.

        `hidden` is what `run` returned: normed, [rows, hidden_size].
        """
        began = time.perf_counter()
        judged = [
            NodeScores(self.forward, entry, hidden if len(entries) == 1 else hidden[rows])
            for entry, rows in zip(entries, row_slices(entries), strict=True)
            if entry.judge is not Judge.NONE
        ]
        if not judged:
            return []
        width = max(scores.entry.draft_width for scores in judged)
        wanted = [scores.entry.draft_heads for scores in judged]
        heads = max(wanted) if all(wanted) else None
        results = None
        if all(scores.entry.rule.greedy for scores in judged):
            results = self.forward.judge_greedy(judged, width, heads, judged[0].entry.draft_tree)
        if results is None:
            look_ahead(self.forward, judged)
            results = [_result(scores) for scores in judged]
        if width and not results[0].candidates:
            self._draft(judged, results, width, heads)
        for scores, result in zip(judged, results, strict=True):
            if scores.entry.draft_width < width:
                result.candidates = [some[: scores.entry.draft_width] for some in result.candidates]
        self.meter.moved += 1
        if not self.meter.is_muted:
            ended = time.perf_counter()
            self._uncounted.append(partial(_count_judging, self.meter, entries, began, ended))
        return results

    def _draft(
        self, judged: list[NodeScores], results: list[Result], width: int, heads: int | None
    ) -> None:
        ends = [each.hidden[r.path[-1]] for each, r in zip(judged, results, strict=True)]
        roots = torch.tensor([result.next_token for result in results], device=self.device)
        tree = judged[0].entry.draft_tree
        drafts = self.forward.draft(torch.stack(ends), roots, width, heads, tree).tolist()
        for result, tokens in zip(results, drafts, strict=True):
            result.candidates = tokens


def _count(meter: StageMeter, entries: Sequence[Entry], began: float, ended: float) -> None:
    rows = sum(len(entry.tokens) for entry in entries)
    points = [entry.point for entry in entries]
    meter.count(rows, decode=is_decode(entries), began=began, ended=ended, points=points)


def _count_judging(meter: StageMeter, entries: Sequence[Entry], began: float, ended: float) -> None:
    meter.count_judging(decode=is_decode(entries), began=began, ended=ended)


def is_decode(entries: Sequence[Entry]) -> bool:
    """Whether a micro-batch is a decode step; no other entries share a micro-batch with one."""
    return entries[0].judge is Judge.TREE


def _result(scores: NodeScores) -> Result:
    rule = scores.entry.rule
    accepted = accept(scores, scores.tokens, scores.parents, scores.position, rule)
    return Result(accepted.path, accepted.next_token, [])


def serve(
    stage: Stage, link: Link, rank: int, world: int, resplit: Callable[[Sequence[int]], None]
) -> Kind:
    """The loop of every rank but the first: receive, compute, pass on, until told otherwise.

    `resplit` shares out the layers anew. Returns what has ended it, BEGIN or STOP.
    """
    after = (rank + 1) % world
    profiler = Profiler(stage, link, rank, world)
    until_next: Activity = "idle"
    while True:
        with stage.meter.during(until_next):
            kind, numbers, hidden = link.receive(rank - 1, stage.meter)
        # Rank 0 sends a tick as soon as it has nothing more to do.
        until_next = "wait" if kind is Kind.BATCH else "idle"
        if kind is Kind.BATCH:
            entries = decode_batch(numbers)
            stage.share(crowd_of(numbers))
            hidden = stage.run(entries, hidden)
            if stage.last:
                link.send(after, Kind.RESULTS, encode_results(stage.judge(entries, hidden)))
            else:
                link.send(after, Kind.BATCH, numbers, hidden)
            stage.settle()
        elif kind is Kind.MEASURE:
            profiler.handle(numbers)
        elif kind is Kind.BEGIN:
            link.send(after, kind, [min(stage.kv_rows or numbers[0], numbers[0])])
        elif kind is Kind.RESPLIT:
            if not stage.last:  # rank 0 learns of it when all is done
                link.send(after, kind, numbers)
            resplit(numbers)
            if stage.last:
                link.send(after, kind)
        else:
            link.send(after, kind)
        if kind is Kind.STOP:
            # Rank 0 may leave as soon as it has the message, before this side knows that it has.
            with suppress(RuntimeError):
                link.flush()
        if kind in (Kind.BEGIN, Kind.STOP):
            return kind
