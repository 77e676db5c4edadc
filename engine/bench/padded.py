"""transformers' `generate` over a left-padded batch: the peer `padded FOLDER THREADS DEVICE`.

Mode "batch" answers all prompts of an Ask together; mode "gap" tells how far apart the two best
logits after `tokens` are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from engine.bench.peer import Ask, Reply


def padded_peer(folder: str, threads: str, device: str) -> Callable[[Ask], Reply]:
    """The model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(threads))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device).eval()

    def answer(ask: Ask) -> Reply:
        if ask.mode == "gap":
            with torch.inference_mode():
                logits = model(torch.tensor([ask.tokens], device=device)).logits[0, -1]
            best = logits.topk(2).values
            return Reply(arrivals=(float(best[0] - best[1]),))
        began = time.perf_counter()
        width = max(map(len, ask.batch))
        pads = [width - len(tokens) for tokens in ask.batch]
        rows = [[0] * n + list(tokens) for n, tokens in zip(pads, ask.batch, strict=True)]
        seen = [[0] * n + [1] * (width - n) for n in pads]
        out = model.generate(
            torch.tensor(rows, device=device),
            attention_mask=torch.tensor(seen, device=device),
            do_sample=False,
            max_new_tokens=max(ask.limits),
            eos_token_id=list(ask.stop) or None,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - began
        found = [
            cut(row[width:].tolist(), limit, ask.stop)
            for row, limit in zip(out, ask.limits, strict=True)
        ]
        return Reply(batch=tuple(found), arrivals=(seconds,))

    return answer


def cut(tokens: Sequence[int], limit: int, stop: Sequence[int]) -> tuple[int, ...]:
    """The answer itself: up to its own limit, or to the token that ended it."""
    ends = (at + 1 for at, token in enumerate(tokens) if token in stop)
    return tuple(tokens[: min(limit, next(ends, limit))])
