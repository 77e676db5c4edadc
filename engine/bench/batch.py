"""`jupiter bench batch`: tokens per second of many sequences at a time, beside one at a time.

64 prompts whose answers have seeded lengths, greedily: our engine at several widths without heads
and at 16 with the config as it is, both also in float32, and transformers' padded batch of 16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from engine.bench.batch_players import BatchPlayer, BatchRun, OurBatch, PaddedBatch
from engine.bench.batch_work import COUNT, LONGEST, lengths, prompts
from engine.bench.command import positive, run_to_end, say
from engine.bench.machine import machine
from engine.bench.players import PeerProcess, Question
from engine.bench.prompts import WARM_UP
from engine.checkpoint.tokenizer import ensure_tokenizer
from engine.cli.options import add_config_options, config_of, model_folder
from engine.config import JupiterConfig
from engine.errors import ExitCode
from engine.model.config import ModelConfig
from engine.text import TextCodec

WIDTHS = (1, 4, 16, 64)
WIDTH = 16
"""Of the comparison with transformers."""
NEAR_TIE = 1e-4
"""Logits so close may come in either order, whoever computes them."""
DEFAULT = f"jupiter, {WIDTH} at a time, config as it is"
EXACT = f"jupiter, {WIDTH} at a time, float32"
PADDED = f"transformers, padded batch of {WIDTH}, float32"
FAMILIES = ("widths", "default", "float32", "transformers")
WARM_UP_TOKENS = 24

# Each ratio is the first one's tokens/s over the second one's.
RATIOS = {
    "b4_vs_b1": ("plain 4", "plain 1"),
    "b16_vs_b1": ("plain 16", "plain 1"),
    "b64_vs_b1": ("plain 64", "plain 1"),
    "b16_vs_transformers": (DEFAULT, PADDED),
    "b16_vs_transformers_f32": (EXACT, PADDED),
}


def main(words: Sequence[str]) -> int:
    """Run the bench; its last line is the JSON."""
    args = _parser().parse_args(words)
    config = config_of(args, args.stages)
    folder = model_folder(config)
    bench = Bench(args, config, folder)
    if code := run_to_end(bench.run()):
        return code
    bench.report(machine(args.threads, ("torch", "transformers")))
    return ExitCode.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jupiter bench batch", description=__doc__.split("\n")[0].partition(": ")[2]
    )
    add_config_options(parser)
    parser.add_argument("--stages", metavar="N,N", help="layers per stage, the config's otherwise")
    parser.add_argument("--prompts", type=positive, default=COUNT, metavar="N", help="the first N")
    parser.add_argument(
        "--longest", type=positive, default=LONGEST, metavar="N", help="of the answers' max_tokens"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=2,
        metavar="N",
        help="of transformers; of our stages \
        together, where the config says nothing",
    )
    parser.add_argument(
        "--only", choices=FAMILIES, action="append", help="leave the others out; repeatable"
    )
    return parser


def plain(width: int) -> str:
    """The name of our engine without heads at a width."""
    return f"plain {width}"


@dataclass
class Bench:
    """The players of one run and what they did."""

    args: argparse.Namespace
    config: JupiterConfig
    folder: Path
    players: list[BatchPlayer] = field(default_factory=list)
    runs: dict[str, list[BatchRun]] = field(default_factory=dict)
    same: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = ModelConfig.from_folder(self.folder)
        self.codec = TextCodec(self.folder, ensure_tokenizer(self.folder, say), model.eos_token_id)
        self.questions = [self._question(chat) for chat in prompts()[: self.args.prompts]]
        self.limits = lengths(len(self.questions), longest=self.args.longest)
        families = self.args.only or FAMILIES
        without = {"medusa_head_path": None, "medusa_num_heads": 0}
        if "widths" in families:
            for width in WIDTHS:
                self._add(plain(width), width, **without)
        if "default" in families:
            self._add(DEFAULT, WIDTH)
        if "float32" in families:
            exact = {"load_in_8bit": False, "load_in_4bit": False, "torch_dtype": "float32"}
            self._add(EXACT, WIDTH, **exact)
        if "transformers" in families:
            words = ["padded", str(self.folder), str(self.args.threads), "cpu"]
            process = PeerProcess(words, self.args.threads)
            stop = sorted(self.codec.stop_ids)
            self.players.append(PaddedBatch(PADDED, process, stop, WIDTH))

    def _question(self, chat: Any) -> Question:
        text = self.codec.render(chat)
        return Question(chat, tuple(self.codec.encode(text, add_special_tokens=False)))

    def _add(self, name: str, width: int, **changes: Any) -> None:
        config = msgspec.structs.replace(
            self.config,
            sampling="greedy",
            max_num_seqs=width,
            max_new_tokens=None,
            max_steps=None,
            **changes,
        )
        # One at a time it is slow: its questions are spread over the whole run.
        part = max(4 * width, WIDTH)
        self.players.append(OurBatch(name, config, part))

    async def run(self) -> None:
        """Have all answer everything in parts, in turns; none is left running."""
        try:
            for player in self.players:
                say(f"loading {player.name}")
                await player.start()
                await player.answer([self._question(WARM_UP)], [WARM_UP_TOKENS])
            places = dict.fromkeys((player.name for player in self.players), 0)
            while any(at < len(self.questions) for at in places.values()):
                for player in self.players:
                    at = places[player.name]
                    if at < len(self.questions):
                        await self._turn(player, slice(at, at + player.part))
                        places[player.name] += player.part
            await self._compare()
        finally:
            for player in self.players:
                await player.stop()

    async def _turn(self, player: BatchPlayer, part: slice) -> None:
        run = await player.answer(self.questions[part], self.limits[part])
        self.runs.setdefault(player.name, []).append(run)
        rate = run.tokens / run.seconds
        say(f"{player.name}: {run.tokens} tokens in {run.seconds:.1f} s, {rate:.0f} tokens/s")

    def answers(self, name: str) -> list[tuple[int, ...]]:
        """All answers of a player, in the order of the questions."""
        return [answer for run in self.runs.get(name, ()) for answer in run.answers]

    async def _compare(self) -> None:
        """Which answers are the same; where they are not, how near to a tie they part."""
        widths = [plain(width) for width in WIDTHS if plain(width) in self.runs]
        for name in widths[1:]:
            pairs = zip(self.answers(name), self.answers(widths[0]), strict=True)
            self.same[f"{name} as {widths[0]}"] = sum(a == b for a, b in pairs)
        padded = next((p for p in self.players if isinstance(p, PaddedBatch)), None)
        if padded is None or EXACT not in self.runs:
            return
        gaps = []
        both = zip(self.questions, self.answers(EXACT), self.answers(PADDED), strict=True)
        for question, ours, theirs in both:
            if ours != theirs:
                shared = next(
                    (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                    min(len(ours), len(theirs)),
                )
                gaps.append(await padded.gap(question.tokens + ours[:shared]))
        self.same["float32 as transformers"] = len(self.questions) - len(gaps)
        self.same["float32, gaps where they part"] = [round(gap, 6) for gap in gaps]

    def report(self, where: str) -> None:
        """The table for people and the line for programs."""
        rates = {
            name: sum(run.tokens for run in runs) / sum(run.seconds for run in runs)
            for name, runs in self.runs.items()
        }
        print(where)
        stages = self.config.stage_num_hidden_layers_list
        print(
            f"{len(self.questions)} prompts, max_tokens {min(self.limits)} to {max(self.limits)}, "
            f"greedy; stages {','.join(map(str, stages))}\n"
        )
        print("| engine | tokens | seconds | tokens/s |\n|---|---:|---:|---:|")
        for name, runs in self.runs.items():
            tokens, seconds = sum(r.tokens for r in runs), sum(r.seconds for r in runs)
            print(f"| {name} | {tokens} | {seconds:.1f} | {rates[name]:.1f} |")
        print()
        found = {
            name: round(rates[a] / rates[b], 3) if a in rates and b in rates else None
            for name, (a, b) in RATIOS.items()
        }
        for name, ratio in found.items():
            print(f"{name}: {'n/a' if ratio is None else f'{ratio:.2f}×'}")
        for name, value in self.same.items():
            print(f"{name}: {value}")
        line = {
            "bench": "batch",
            "ratios": found,
            "tokens_per_s": {name: round(rate, 1) for name, rate in rates.items()},
            "same_tokens": self.same,
            "prompts": len(self.questions),
            "stages": stages,
            "machine": where,
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)
