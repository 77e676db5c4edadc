"""The other side of `jupiter bench train`: a plain transformers loop, padded as its users pad."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import psutil
import torch

from engine.model.config import ModelConfig
from engine.text import TextCodec
from engine.training.args import parse_arguments
from engine.training.args_resolve import with_model
from engine.training.data import load_samples, micro_batches
from engine.training.template import Sample


def main(words: list[str]) -> int:
    """Train as the words of `jupiter sft` say; prints the figures as JSON."""
    from transformers import AutoModelForCausalLM

    args = parse_arguments(words, "sft")
    folder = Path(args.model or "")
    config = ModelConfig.from_folder(folder)
    args = with_model(args, config, folder)
    codec = TextCodec(folder, folder / "tokenizer.json", config.eos_token_id)
    samples = load_samples(args, codec, "train")
    stream = micro_batches(samples, args=args, dp_rank=0, dp_size=1, consumed_samples=0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    rates, steps = [], args.accumulation_steps(1)
    for _ in range(args.train_iters or 1):
        began, tokens = time.perf_counter(), 0
        optimizer.zero_grad()
        for _ in range(steps):
            batch = next(stream)
            (model(**padded(batch)).loss / steps).backward()
            tokens += sum(map(len, batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        rates.append(tokens / (time.perf_counter() - began))
    memory = psutil.Process().memory_info().rss
    print(json.dumps({"tokens_per_s": statistics.median(rates[1:]), "memory_bytes": [memory]}))
    return 0


def padded(batch: list[Sample]) -> dict[str, torch.Tensor]:
    """A micro-batch as transformers takes it."""
    longest = max(map(len, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, sample in enumerate(batch):
        tokens = torch.tensor(sample.tokens)
        ids[row, : len(sample)] = tokens
        mask[row, : len(sample)] = 1
        counted = torch.tensor(sample.targets)
        labels[row, : len(sample)][counted] = tokens[counted]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
