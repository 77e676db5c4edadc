"""One rank of one player in the network bench: `python -m engine.bench.network.rank`.

Rank 0 reads questions, a JSON line each, and writes a JSON line for each answer; the end of its
input ends all ranks.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from engine.bench.network.lockstep import LockStep
from engine.bench.network.rig import INTERFACE
from engine.bench.network.tensor_parallel import TensorParallel, cut
from engine.checkpoint.load import load_weights
from engine.config import JupiterConfig, parse_config
from engine.decoding.tree import choose_tree
from engine.model.medusa import NO_HEADS, MedusaLlamaForCausalLM
from engine.pipeline.build import Plan, build_stage, make_plan
from engine.pipeline.group import join_by_address
from engine.pipeline.run import load_codec, run_rank
from engine.pipeline.stage import Stage
from engine.protocol import (
    EngineReady,
    Event,
    Failed,
    Finished,
    Generate,
    Message,
    SamplingParams,
    Shutdown,
    StageTelemetry,
    Tokens,
)
from engine.text import TextCodec

Answer = Callable[[list[int], int, frozenset[int]], list[int]]


def main(player: str, rank: int, folder: str, text: str) -> None:
    """Serve as a rank until rank 0 has no more questions."""
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    config = parse_config(json.loads(text), "the bench's config")
    torch.set_num_threads(config.num_threads or 1)
    plan = make_plan(config, Path(folder))
    world = config.world_size
    if player == "jupiter":
        stage = build_stage(plan, rank, torch.device("cpu"), lambda done, total: None)
        join_by_address(rank, world, "gloo", config)
        _run_jupiter(plan, stage, rank)
    elif player == "lockstep":
        stage = build_stage(plan, rank, torch.device("cpu"), lambda done, total: None)
        join_by_address(rank, world, "gloo", config)
        tree = choose_tree("mc_63", plan.heads.num_heads)
        one = LockStep(stage, rank, world, tree)
        if rank:
            one.serve()
        else:
            _answer_all(load_codec(plan), one.answer)
            one.end()
    else:
        _run_tensor(plan, config, rank)


def _run_tensor(plan: Plan, config: JupiterConfig, rank: int) -> None:
    model = MedusaLlamaForCausalLM(plan.model, NO_HEADS)
    load_weights(
        model,
        plan.folder,
        None,
        dtype=torch.float32,
        device=torch.device("cpu"),
        progress=lambda done, total: None,
    )
    model.eval().requires_grad_(False)
    cut(model, rank, config.world_size)
    stage = Stage(
        model,
        first=True,
        last=True,
        context_length=plan.context_length,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    join_by_address(rank, config.world_size, "gloo", config)
    one, codec = TensorParallel(stage, rank), load_codec(plan)
    if rank:
        one.serve(codec.stop_ids)
    else:
        _answer_all(codec, one.answer)
        one.end()


def _answer_all(codec: TextCodec, answer: Answer) -> None:
    _tell({"ready": True})
    for question in _questions():
        began = time.perf_counter()
        text = codec.render([Message("user", question["text"])])
        prompt = codec.encode(text, add_special_tokens=False)
        tokens = answer(prompt, question["max_tokens"], codec.stop_ids)
        _tell({"seconds": time.perf_counter() - began, "tokens": tokens, "prompt": len(prompt)})


def _run_jupiter(plan: Plan, stage: Stage, rank: int) -> None:
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ended = threading.Event()
    began = 0.0
    tokens: list[int] = []
    link = ""

    def ask() -> None:
        nonlocal began, tokens
        for number, question in enumerate(_questions()):
            ended.clear()
            began, tokens = time.perf_counter(), []
            inbox.put(
                Generate(
                    request_id=str(number),
                    messages=(Message("user", question["text"]),),
                    params=SamplingParams(temperature=0, max_tokens=question["max_tokens"]),
                )
            )
            ended.wait()
        inbox.put(Shutdown())

    def emit(event: Event) -> None:
        nonlocal link
        match event:
            case StageTelemetry():
                link = event.link_dtype
            case EngineReady():
                _tell({"ready": True})
            case Tokens():
                tokens.extend(event.token_ids)
            case Finished():
                seconds = time.perf_counter() - began
                told = {"seconds": seconds, "tokens": tokens, "prompt": event.prompt_tokens}
                _tell({**told, "link": link})
                ended.set()
            case Failed():
                _tell({"error": event.message})
                ended.set()

    if rank == 0:
        threading.Thread(target=ask, daemon=True).start()
    run_rank(plan, stage, rank, inbox=inbox, emit=emit)


def _questions() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def _tell(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
    sys.stdout.flush()
    os._exit(0)
