"""`jupiter bench decode`: tokens per second of one conversation, beside other engines.

All engines answer the same prompts greedily, in turns, in one run: ours over one and two stages
and without heads, transformers' `generate` in two dtypes and with prompt lookup, llama.cpp.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from engine.bench.command import positive, run_to_end, say
from engine.bench.contest import Contest
from engine.bench.figures import (
    BFLOAT16,
    F16,
    FLOAT32,
    LOOKUP,
    OURS,
    PLAIN,
    PLAYERS,
    Q4_1,
    TWO_STAGES,
    Run,
    figures,
    ratios,
    table,
)
from engine.bench.machine import machine
from engine.bench.players import OurEngine, Peer, PeerProcess, Player, Question
from engine.bench.prompts import FILE_VARIABLE, WARM_UP, Chat, choose_prompts
from engine.checkpoint.preflight import find_heads
from engine.checkpoint.tokenizer import ensure_tokenizer
from engine.cli.options import add_config_options, config_of, model_folder
from engine.config import JupiterConfig
from engine.errors import CheckpointError, ExitCode
from engine.model.config import ModelConfig
from engine.planning.memory import layer_shapes
from engine.text import TextCodec

FAMILIES = ("jupiter", "transformers", "llamacpp")
NO_LLAMACPP = (
    "llama-cpp-python is not installed; pip install 'jupiter-workbench[bench-llamacpp]' builds it"
)
# Bytes for each weight of the model that all players together hold: ours thrice in float32 at
# most, transformers in float32 and bfloat16, llama.cpp in F16 and Q4_1.
BYTES_PER_WEIGHT = 3 * 4 + 4 + 2 + 2 + 0.7
PROCESS_BYTES = 400 << 20
PROCESSES = 7


def main(words: Sequence[str]) -> int:
    """Run the bench; its last line is the JSON."""
    args = _parser().parse_args(words)
    config = config_of(args)
    source, chats = choose_prompts(args.file, args.prompts)
    folder = model_folder(config)
    bench = _Bench(args, config, folder)
    questions = [bench.question(chat) for chat in chats]
    contest = Contest(bench.players, bench.question(WARM_UP), args.max_new_tokens, say)
    contest.missing.update(bench.missing)
    together = _fits(ModelConfig.from_folder(folder))
    if not together:
        say("not enough memory for all engines at a time: they come one after the other")
    if code := run_to_end(contest.run(questions, side_by_side=together)):
        return code
    packages = ("torch", "transformers", "llama-cpp-python")
    told = {
        "machine": machine(args.threads, packages),
        "prompts": len(chats),
        "prompts_from": source,
        "max_new_tokens": args.max_new_tokens,
        "interleaved": together,
    }
    _report(told, contest)
    return ExitCode.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jupiter bench decode", description=__doc__.split("\n")[0].partition(": ")[2]
    )
    add_config_options(parser)
    parser.add_argument(
        "--file", metavar="F", help=f"prompts, JSON lines; else {FILE_VARIABLE}, else our own"
    )
    parser.add_argument("--prompts", type=positive, metavar="N", help="so many of them, evenly")
    parser.add_argument("--max_new_tokens", type=positive, default=128, metavar="N")
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="of each engine")
    parser.add_argument(
        "--only", choices=FAMILIES, action="append", help="leave the others out; repeatable"
    )
    return parser


class _Bench:
    """The players of one run, and why others are missing."""

    def __init__(self, args: argparse.Namespace, config: JupiterConfig, folder: Path) -> None:
        self.players: list[Player] = []
        self.missing: dict[str, str] = {}
        self._config = msgspec.structs.replace(
            config, sampling="greedy", num_threads=args.threads, max_new_tokens=None, max_steps=None
        )
        self._folder, self._threads = folder, str(args.threads)
        self._model = ModelConfig.from_folder(folder)
        self._codec = TextCodec(folder, ensure_tokenizer(folder, say), self._model.eos_token_id)
        families = args.only or FAMILIES
        self.missing.update(dict.fromkeys(PLAYERS, "left out by --only"))
        if "jupiter" in families:
            self._add_ours()
        if "transformers" in families:
            self._add_transformers()
        if "llamacpp" in families:
            self._add_llamacpp()
        for player in self.players:
            self.missing.pop(player.name, None)

    def question(self, chat: Chat) -> Question:
        """A chat with its tokens, as rank 0 makes them."""
        text = self._codec.render(chat)
        tokens = self._codec.encode(text, add_special_tokens=False)
        return Question(chat, tuple(tokens))

    def _add_ours(self) -> None:
        layers, split = self._model.num_hidden_layers, self._config.stage_num_hidden_layers_list
        self._add_engine(OURS, [layers])
        if len(split) == 2 and not self._config.auto_split:
            self._add_engine(TWO_STAGES, split)
        elif layers > 1:
            self._add_engine(TWO_STAGES, [math.ceil(layers / 2), layers // 2])
        else:
            self.missing[TWO_STAGES] = "the model has one layer only"
        if find_heads(self._config, self._folder) is None:
            self.missing[PLAIN] = "the config has no heads: decoding is plain already"
        else:
            self._add_engine(PLAIN, [layers], medusa_head_path=None, medusa_num_heads=0)

    def _add_engine(self, name: str, split: list[int], **changes: Any) -> None:
        config = msgspec.structs.replace(
            self._config, stage_num_hidden_layers_list=split, **changes
        )
        self.players.append(OurEngine(name, config))

    def _add_transformers(self) -> None:
        process = PeerProcess(
            ["transformers", str(self._folder), self._threads, self._device()], int(self._threads)
        )
        for name, mode in ((FLOAT32, "float32"), (BFLOAT16, "bfloat16"), (LOOKUP, "")):
            self._add_peer(name, process, mode)

    def _add_llamacpp(self) -> None:
        if importlib.util.find_spec("llama_cpp") is None:
            self.missing.update({F16: NO_LLAMACPP, Q4_1: NO_LLAMACPP})
            return
        from engine.bench.gguf_files import Kind, gguf_file

        context = min(self._config.max_kv_cache_length, self._model.context_limit)
        kinds: dict[str, Kind] = {F16: "F16", Q4_1: "Q4_1"}
        for name, kind in kinds.items():
            try:
                file = gguf_file(self._config.base_model_name_or_path, self._folder, kind, say)
            except CheckpointError as error:
                self.missing[name] = str(error)
                continue
            words = ["llamacpp", str(file), self._threads, self._device(), str(context)]
            self._add_peer(name, PeerProcess(words, int(self._threads)), "")

    def _add_peer(self, name: str, process: PeerProcess, mode: str) -> None:
        self.players.append(Peer(name, process, sorted(self._codec.stop_ids), mode))

    def _device(self) -> str:
        import torch

        wanted = self._config.device
        return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def _fits(model: ModelConfig) -> bool:
    """Whether the memory that is free holds all players at a time."""
    layer = sum(math.prod(shape) for shape in layer_shapes(model).values())
    table = model.vocab_size * model.hidden_size
    weights = layer * model.num_hidden_layers + table * (1 if model.tie_word_embeddings else 2)
    needed = weights * BYTES_PER_WEIGHT + PROCESSES * PROCESS_BYTES
    return needed < 0.9 * int(psutil.virtual_memory().available)


def _report(told: dict[str, Any], contest: Contest) -> None:
    """The table for people and the line for programs."""
    measured = {name: figures(contest.runs[name]) for name in PLAYERS if name in contest.runs}
    found, reasons = ratios(measured, contest.missing)
    print(f"{told['machine']}")
    print(f"{told['prompts']} prompts ({told['prompts_from']}), greedy, ", end="")
    print(f"{told['max_new_tokens']} new tokens, one sequence\n")
    print("\n".join(table(measured)))
    print()
    for name, ratio in found.items():
        print(f"{name}: {reasons[name] if ratio is None else f'{ratio:.2f}×'}")
    equal = {
        name: same_tokens(contest.runs[name], contest.runs[PLAIN])
        for name in (OURS, TWO_STAGES)
        if name in contest.runs and PLAIN in contest.runs
    }
    for name, count in equal.items():
        print(f"{name}: the tokens of plain decoding on {count} of {told['prompts']} prompts")
    engines = {
        name: {key: value and round(value, 3) for key, value in vars(one).items()}
        for name, one in measured.items()
    }
    line = {
        "bench": "decode",
        "ratios": found,
        "reasons": reasons,
        "engines": engines,
        "same_tokens_as_plain": equal,
        **told,
    }
    print(json.dumps(line, ensure_ascii=False), flush=True)


def same_tokens(runs: Sequence[Run], plain: Sequence[Run]) -> int:
    """On how many prompts two engines wrote the very same tokens."""
    return sum(a.tokens == b.tokens for a, b in zip(runs, plain, strict=True))
