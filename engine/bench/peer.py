"""The other engines, each in a process of its own: `python -m engine.bench.peer KIND WORDS`.

`transformers FOLDER THREADS DEVICE`, `llamacpp FILE THREADS DEVICE CONTEXT` or `padded FOLDER
THREADS DEVICE` (engine.bench.padded). It loads its models, says so with an empty Reply, and then
answers each Ask on stdin with a Reply on stdout, a line each.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec

LOOKUP_TOKENS = 10
"""Tokens that prompt lookup drafts at most; its author's figure."""


class Ask(msgspec.Struct, frozen=True):
    """What a peer process is asked for, a line of JSON."""

    tokens: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    """An answer ends behind one of these."""
    max_tokens: int = 0
    mode: str = ""
    """Which of its models and ways, where it has several."""
    batch: tuple[tuple[int, ...], ...] = ()
    """Prompts that are to be answered together."""
    limits: tuple[int, ...] = ()
    """Most tokens of each of these answers."""


class Reply(msgspec.Struct, frozen=True):
    """What a peer process answers, a line of JSON; the first says that it is ready."""

    tokens: tuple[int, ...] = ()
    arrivals: tuple[float, ...] = ()
    """Seconds from the question to each step's end; see `run_of`."""
    first: int = 0
    batch: tuple[tuple[int, ...], ...] = ()
    """The answers to the prompts of a batch; `arrivals` is what they all took, then."""


def transformers_peer(folder: str, threads: str, device: str) -> Callable[[Ask], Reply]:
    """`generate` of transformers; modes "float32", "bfloat16", and either with "+lookup"."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(threads))
    models: dict[str, Any] = {}
    for name in ("float32", "bfloat16"):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, name))
        models[name] = model.to(device).eval()

    def answer(ask: Ask) -> Reply:
        dtype, _, lookup = ask.mode.partition("+")
        clock = _Clock()
        prompt = torch.tensor([ask.tokens], device=device)
        models[dtype].generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=clock,
            do_sample=False,
            max_new_tokens=ask.max_tokens,
            eos_token_id=list(ask.stop) or None,
            pad_token_id=0,
            **({"prompt_lookup_num_tokens": LOOKUP_TOKENS} if lookup else {}),
        )
        return Reply(tuple(clock.tokens), tuple(clock.arrivals), clock.first)

    return answer


class _Clock:
    """A streamer as transformers wants it, which notes when tokens come."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.arrivals: list[float] = []
        self.first = 0
        self._began = time.perf_counter()
        self._prompt = True

    def put(self, tokens: Any) -> None:
        """The prompt at first, then the tokens of each step."""
        if self._prompt:
            self._prompt = False
            return
        self.arrivals.append(time.perf_counter() - self._began)
        self.tokens += tokens.flatten().tolist()
        self.first = self.first or len(self.tokens)

    def end(self) -> None:
        """Nothing is held back."""


def llamacpp_peer(file: str, threads: str, device: str, context: str) -> Callable[[Ask], Reply]:
    """`Llama.generate` of llama-cpp-python, its lowest loop."""
    from llama_cpp import Llama

    model = Llama(
        file,
        n_ctx=int(context),
        n_threads=int(threads),
        n_threads_batch=int(threads),
        n_gpu_layers=0 if device == "cpu" else -1,
        verbose=False,
    )

    def answer(ask: Ask) -> Reply:
        tokens: list[int] = []
        arrivals: list[float] = []
        began = time.perf_counter()
        for token in model.generate(list(ask.tokens), temp=0.0, repeat_penalty=1.0):
            arrivals.append(time.perf_counter() - began)
            tokens.append(int(token))
            if token in ask.stop or len(tokens) == ask.max_tokens:
                break
        return Reply(tuple(tokens), tuple(arrivals), 1)

    return answer


def _padded_peer(folder: str, threads: str, device: str) -> Callable[[Ask], Reply]:
    from engine.bench.padded import padded_peer

    return padded_peer(folder, threads, device)


PEERS: dict[str, Callable[..., Callable[[Ask], Reply]]] = {
    "transformers": transformers_peer,
    "llamacpp": llamacpp_peer,
    "padded": _padded_peer,
}


def main(words: list[str]) -> None:
    """Serve until stdin ends."""
    # Libraries may print what they like: the replies have a descriptor of their own.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    answer = PEERS[words[0]](*words[1:])
    replies.write(msgspec.json.encode(Reply()) + b"\n")
    for line in sys.stdin.buffer:
        reply = answer(msgspec.json.decode(line, type=Ask))
        replies.write(msgspec.json.encode(reply) + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
