"""`jupiter bench quality`: what quantization costs, on a text that the user gives.

Perplexity of the text, and how often the likeliest next token is that of float32. Both models run
as one stage each, on what answers requests too, one after the other.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from engine.cli.options import add_config_options, config_of, model_folder, on_one_stage
from engine.config import JupiterConfig
from engine.errors import ConfigError, ExitCode
from engine.launch import worker_environment

if TYPE_CHECKING:
    from engine.pipeline.stage import Stage

CHUNK = 128
"""Rows of one forward: as many as of a prompt's chunk."""


@dataclass(frozen=True)
class Reading:
    """What a model makes of a text."""

    nll: float
    """Sum of the negative log likelihoods, in nats, of all tokens but the first of each window."""
    likeliest: list[int]
    """The most likely token after each token but the last of each window."""

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood."""
        return math.exp(self.nll / len(self.likeliest))

    def agreement(self, other: Reading) -> float:
        """Share of positions with the same likeliest token."""
        pairs = zip(self.likeliest, other.likeliest, strict=True)
        return sum(a == b for a, b in pairs) / len(self.likeliest)


def main(words: Sequence[str]) -> int:
    """Run the bench; its last line is the JSON."""
    args = _parser().parse_args(words)
    text = _read(args.text)
    config = config_of(args)
    bits = args.bits or config.weight_bits or 8
    folder = model_folder(config)
    # As a worker has it, and read when torch is loaded: below.
    threads = on_one_stage(msgspec.structs.replace(config, num_threads=args.threads), folder)
    os.environ.update(worker_environment(threads))
    from engine.bench.machine import machine
    from engine.pipeline.build import make_plan
    from engine.pipeline.run import load_codec

    plan = make_plan(_variant(threads, None), folder)
    tokens = load_codec(plan).encode(text, add_special_tokens=False)[: args.tokens]
    windows = cut(tokens, min(args.window, plan.context_length))
    if not windows:
        raise ConfigError(f"--text {args.text}: too short; at least 2 tokens are needed")
    _say(f"float32: {sum(map(len, windows))} tokens")
    exact = _read_with(_variant(threads, None), folder, windows)
    _say(f"int{bits}")
    rounded = _read_with(_variant(threads, bits), folder, windows)
    _report(machine(args.threads, ("torch",)), bits, exact, rounded)
    return ExitCode.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jupiter bench quality", description=__doc__.split("\n")[0].partition(": ")[2]
    )
    add_config_options(parser)
    parser.add_argument("--text", required=True, metavar="F", help="text that was not trained on")
    parser.add_argument("--bits", type=int, choices=(8, 4), help="default: the config's, or else 8")
    parser.add_argument("--tokens", type=_positive, default=8192, metavar="N", help="read so many")
    parser.add_argument("--window", type=_positive, default=512, metavar="N", help="context length")
    parser.add_argument("--threads", type=_positive, default=2, metavar="N")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"--text {name}: {reason}") from None


def cut(tokens: Sequence[int], size: int) -> list[list[int]]:
    """Windows of `size` tokens one after the other; the last is shorter, none has less than 2."""
    windows = [list(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    return [window for window in windows if len(window) > 1]


def _variant(config: JupiterConfig, bits: int | None) -> JupiterConfig:
    """The model as one stage without heads: plain float32, or quantized in the config's dtype."""
    return msgspec.structs.replace(
        config,
        medusa_head_path=None,
        medusa_num_heads=0,
        medusa_choices="auto",  # explicit paths would ask for heads
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        torch_dtype="float32" if bits is None else config.torch_dtype,
    )


def _read_with(config: JupiterConfig, folder: Path, windows: Sequence[Sequence[int]]) -> Reading:
    from engine.pipeline.build import build_stage, choose_device, make_plan

    plan = make_plan(config, folder)
    device = choose_device(config.device, 0)
    return read(build_stage(plan, 0, device, lambda done, total: None), windows)


def read(stage: Stage, windows: Sequence[Sequence[int]]) -> Reading:
    """Read each window from an empty KV cache; `stage` is a whole model."""
    import torch

    from engine.pipeline.batch import Entry, Judge

    nll, likeliest = 0.0, []
    with torch.inference_mode():
        for window in windows:
            for start in range(0, len(window) - 1, CHUNK):
                tokens = list(window[start : start + CHUNK])
                parents = list(range(-1, len(tokens) - 1))
                hidden = stage.run([Entry(0, start, tokens, parents, Judge.NONE)], None)
                answers = torch.tensor(window[start + 1 : start + 1 + CHUNK], device=hidden.device)
                logits = stage.forward.logits(hidden[: len(answers)])
                loss = torch.nn.functional.cross_entropy(logits, answers, reduction="sum")
                nll += loss.item()
                likeliest += logits.argmax(dim=-1).tolist()
    return Reading(nll, likeliest)


def _report(where: str, bits: int, exact: Reading, rounded: Reading) -> None:
    change = rounded.perplexity / exact.perplexity - 1
    agreement = rounded.agreement(exact)
    print(where)
    print(f"{len(exact.likeliest)} tokens predicted\n")
    print("| weights | perplexity | change | same likeliest token |")
    print("|---|---:|---:|---:|")
    print(f"| float32 | {exact.perplexity:.3f} | | |")
    print(f"| int{bits} | {rounded.perplexity:.3f} | {change:+.2%} | {agreement:.2%} |")
    line = {
        "bench": "quality",
        "bits": bits,
        "tokens": len(exact.likeliest),
        "perplexity_float32": round(exact.perplexity, 4),
        "perplexity": round(rounded.perplexity, 4),
        "perplexity_change": round(change, 5),
        "greedy_agreement": round(agreement, 5),
        "machine": where,
    }
    print(json.dumps(line, ensure_ascii=False), flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
