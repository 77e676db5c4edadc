"""A rank's whole working life, once its stage is built: the scheduler on rank 0, else the loop."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import torch.distributed as dist

from engine.checkpoint.tokenizer import ensure_tokenizer
from engine.decoding.tuner import Drafting, TreeTuner
from engine.errors import StageLostError
from engine.pipeline.build import Plan
from engine.pipeline.group import stages_here, tick_seconds
from engine.pipeline.link import Kind, Link
from engine.pipeline.link_policy import agreed_link_dtype
from engine.pipeline.memory import kv_rows
from engine.pipeline.meter import StageMeter
from engine.pipeline.rehearsal import rehearse
from engine.pipeline.resplit import change_split, decode_split
from engine.pipeline.scheduler import Arrived, LinkDown, Scheduler
from engine.pipeline.stage import Stage, serve
from engine.pipeline.telemetry import TelemetrySender
from engine.protocol import EngineReady, Event, StageState
from engine.text import TextCodec

# Seconds to wait for the receiving thread; it may be in a receive that goes on.
RESULTS_END_S = 0.5
HAND_OVER_S = 0.0003
"""The receiving thread leaves the interpreter to the one that it has woken, which has a step to
send: nothing comes before that."""


@dataclass
class Kept:
    """What rank 0 knows whatever group it is in."""

    codec: TextCodec
    drafting: Drafting
    rehearsed: bool = False
    """The drafting knows what its trees cost."""

    @classmethod
    def of(cls, plan: Plan) -> Kept:
        """As it is at a start."""
        return cls(load_codec(plan), plan.drafting())


def run_rank(
    plan: Plan,
    stage: Stage,
    rank: int,
    *,
    inbox: queue.SimpleQueue[Any],
    emit: Callable[[Event], None],
    kept: Kept | None = None,
) -> None:
    """Serve as `rank` until told to stop; the process group, if any, is joined already.

    `kept` is what rank 0 had in a group before; made anew without it.
    `inbox` brings commands to rank 0; `emit` takes events of every rank.
    Raises StageLostError when a neighbour is gone.
    """
    world = plan.config.world_size
    link = None
    if world > 1:
        link = Link(
            hidden_size=plan.model.hidden_size,
            dtype=plan.dtype,
            device=stage.device,
            nccl=dist.get_backend() == "nccl",
            link_dtype=agreed_link_dtype(plan.config, stage, rank),
        )
    if stage.kv_rows is None:
        stage.kv_rows = kv_rows(stage, stages_here(plan.config))
    try:
        if link is not None and rank > 0:
            return _run_other(plan, stage, link, rank, emit)
        return _run_first(plan, stage, link, kept or Kept.of(plan), inbox, emit)
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        problem = _first_line(error)
    # Outside of the handler: the error's frames hold on to the link, which has to close.
    raise StageLostError(f"rank {rank} lost a neighbour: {problem}")


def _run_other(
    plan: Plan, stage: Stage, link: Link, rank: int, emit: Callable[[Event], None]
) -> None:
    world = plan.config.world_size
    resplit = partial(_resplit, plan, stage, rank, emit)
    if serve(stage, link, rank, world, resplit) is Kind.BEGIN:
        with _measured(stage, link, emit):
            serve(stage, link, rank, world, resplit)


def _resplit(
    plan: Plan, stage: Stage, rank: int, emit: Callable[[Event], None], numbers: Sequence[int]
) -> None:
    """Share out the layers anew, as the numbers of a RESPLIT message say, and tell it."""
    old, (new, slots) = plan.config.stage_num_hidden_layers_list, decode_split(numbers)
    change_split(stage, rank, old, new, slots)
    plan.config = msgspec.structs.replace(plan.config, stage_num_hidden_layers_list=new)
    layers = plan.layers(rank)
    emit(
        StageState(phase="ready", first_layer=layers.start, num_layers=len(layers), pid=os.getpid())
    )


def _run_first(
    plan: Plan,
    stage: Stage,
    link: Link | None,
    kept: Kept,
    inbox: queue.SimpleQueue[Any],
    emit: Callable[[Event], None],
) -> None:
    codec, drafting = kept.codec, kept.drafting
    last = plan.config.world_size - 1
    if isinstance(drafting, TreeTuner) and not kept.rehearsed:
        context, largest = plan.context_length, drafting.largest().size
        costs = rehearse(stage, link, last, context_length=context, largest=largest)
        drafting.begin(*costs)
        kept.rehearsed = True

    def ready() -> None:
        emit(_ready(plan, stage, codec, drafting.tree.size, scheduler.context_length))

    with _results_of(stage, link, last, inbox) as room, _measured(stage, link, emit):
        scheduler = Scheduler(
            stage,
            link,
            codec,
            plan.config,
            drafting,
            context_length=plan.context_length,
            kv_rows=room,
            inbox=inbox,
            emit=emit,
            tick_s=tick_seconds(plan.config),
            resplit=partial(_resplit, plan, stage, 0, emit),
            on_resplit=ready,
        )
        ready()
        if (news := drafting.news()) is not None:
            emit(news)
        scheduler.run()


@contextmanager
def _results_of(
    stage: Stage, link: Link | None, last: int, inbox: queue.SimpleQueue[Any]
) -> Iterator[int]:
    """Begin to put what rank `last` sends into the inbox, in a thread.

    Gives the KV rows that every stage has memory for.
    """
    if link is None:
        yield stage.kv_rows or 1
        return
    link.send(1, Kind.BEGIN, [stage.kv_rows or 1])
    _, (least,), _ = link.receive(last)
    thread = threading.Thread(
        target=_receive_results, args=(link, last, inbox), name="jupiter-results", daemon=True
    )
    thread.start()
    try:
        yield least
    finally:
        # The others notice that this rank is gone when the last that holds the connections ends.
        thread.join(RESULTS_END_S)


def _measured(stage: Stage, link: Link | None, emit: Callable[[Event], None]) -> TelemetrySender:
    """Sends figures while it is open; what came before, such as warming up, is not of the run."""
    stage.meter = StageMeter()
    if link is not None:
        link.meter = stage.meter
        stage.meter.link_dtype = link.form.kind
    return TelemetrySender(stage, emit)


def load_codec(plan: Plan) -> TextCodec:
    """The tokenizer and chat template of the plan's model."""
    return TextCodec(plan.folder, ensure_tokenizer(plan.folder), plan.model.eos_token_id)


def _ready(
    plan: Plan, stage: Stage, codec: TextCodec, tree_size: int, context_length: int
) -> EngineReady:
    return EngineReady(
        model=model_name(plan.config.base_model_name_or_path),
        stages=tuple(plan.config.stage_num_hidden_layers_list),
        device=str(stage.device),
        dtype=plan.config.torch_dtype,
        medusa_num_heads=plan.heads.num_heads,
        tree_size=tree_size,
        tree_tuned=plan.tuned,
        context_length=context_length,
        has_chat_template=codec.has_chat_template,
    )


def model_name(source: str) -> str:
    """A short name for people: the last part of a path or hub id, without a package's version."""
    return source.removeprefix("pypi:").split("==")[0].rstrip("/").rsplit("/", 1)[-1]


def _receive_results(link: Link, last: int, inbox: queue.SimpleQueue[Any]) -> None:
    kind = Kind.TICK
    while kind is not Kind.STOP:
        try:
            kind, numbers, _ = link.receive(last)
        except RuntimeError as error:
            inbox.put(LinkDown(link, _first_line(error)))
            return
        inbox.put(Arrived(link, kind, numbers))
        time.sleep(HAND_OVER_S)


def _is_lost_peer(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("gloo", "connection", "timed out", "nccl", "socket"))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
