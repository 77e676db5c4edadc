"""`jupiter bench prefill`: time to first token of long prompts, cut into chunks or whole.

Each prompt goes through the stages as successive chunks, with all stages at work at once, and as
one piece, which is with one stage at a time; and through one process with all threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.bench.command import positive, run_to_end, say
from engine.bench.machine import machine
from engine.checkpoint.tokenizer import ensure_tokenizer
from engine.cli.options import add_config_options, config_of, model_folder
from engine.client import EngineClient
from engine.config import JupiterConfig
from engine.errors import ConfigError, EngineError, ExitCode
from engine.launch import usable_cores
from engine.model.config import ModelConfig
from engine.planning.chunks import prefill_chunks
from engine.planning.prediction import makespan
from engine.protocol import Failed, Finished, SamplingParams, Tokens
from engine.text import TextCodec

LENGTHS = (256, 1024, 4096)
WORLDS = (2, 3)
ROUNDS = 5
WORDS = ("river", "stone", "market", "winter", "letter", "music", "garden", "engine", "bread")


def main(words: Sequence[str]) -> int:
    """Run the bench; its last line is the JSON."""
    args = _parser().parse_args(words)
    config = config_of(args)
    folder = model_folder(config)
    model = ModelConfig.from_folder(folder)
    lengths = [n for n in args.lengths if n < model.context_limit]
    if not lengths:
        raise ConfigError(f"--lengths: the model's context holds {model.context_limit} tokens")
    codec = TextCodec(folder, ensure_tokenizer(folder, say), model.eos_token_id)
    bench = Bench(config, codec, model.num_hidden_layers, lengths, args)
    if code := run_to_end(bench.run()):
        return code
    bench.report(machine(args.threads, ("torch",)))
    return ExitCode.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jupiter bench prefill", description=__doc__.split("\n")[0].partition(": ")[2]
    )
    add_config_options(parser)
    parser.add_argument("--lengths", type=positive, nargs="+", default=LENGTHS, metavar="N")
    parser.add_argument("--worlds", type=positive, nargs="+", default=WORLDS, metavar="N")
    parser.add_argument("--rounds", type=positive, default=ROUNDS, metavar="N")
    parser.add_argument(
        "--threads", type=positive, default=usable_cores(), metavar="N", help="of the one process"
    )
    return parser


@dataclass
class Way:
    """An engine: so many stages, and prompts in chunks or whole."""

    world: int
    chunked: bool
    client: EngineClient
    times: dict[int, list[float]] = field(default_factory=dict)
    """Seconds to the first token, by the prompt's length."""

    @property
    def name(self) -> str:
        """For people."""
        if self.world == 1:
            return "1 process, all threads"
        return f"{self.world} stages, {'chunks' if self.chunked else 'whole'}"

    async def ask(self, prompt: str) -> float:
        """Seconds from the question to its first token."""
        began = time.perf_counter()
        found = None
        params = SamplingParams(max_tokens=1, temperature=0)
        async for event in self.client.submit(prompt=prompt, params=params):
            if isinstance(event, Tokens) and found is None:
                found = time.perf_counter() - began
            elif isinstance(event, Failed):
                raise EngineError(event.message)
            elif isinstance(event, Finished) and found is None:
                raise EngineError("an answer without a token")
        assert found is not None
        return found


class Bench:
    """All ways, in turns."""

    def __init__(
        self,
        config: JupiterConfig,
        codec: TextCodec,
        layers: int,
        lengths: Sequence[int],
        args: argparse.Namespace,
    ) -> None:
        self.config, self.codec, self.layers = config, codec, layers
        self.lengths, self.rounds = lengths, args.rounds
        self.ways = [self._way(1, True, args.threads)]
        for world in args.worlds:
            self.ways += [self._way(world, chunked, 1) for chunked in (True, False)]

    def _way(self, world: int, chunked: bool, threads: int) -> Way:
        longest = max(self.lengths)
        changes: dict[str, Any] = {
            "stage_num_hidden_layers_list": even_split(self.layers, world),
            "num_threads": threads,
            "max_kv_cache_length": max(longest + 8, self.config.max_kv_cache_length),
            # Each prompt is new; two slots would only hold rows that nobody asks for again.
            "max_num_seqs": 1,
            "medusa_head_path": None,
            "medusa_num_heads": 0,
        }
        if not chunked:
            changes |= {"num_sub_sequences": 1, "max_sub_sequence_len": longest}
        config = msgspec.structs.replace(self.config, **changes)
        return Way(world, chunked, EngineClient(config))

    async def run(self) -> None:
        """Ask every way every length, in turns; none is left running."""
        try:
            for way in self.ways:
                say(f"loading {way.name}")
                await way.client.start()
                await way.ask(self.prompt(min(self.lengths), -1))
            for turn in range(self.rounds):
                for length in self.lengths:
                    prompt = self.prompt(length, turn)
                    first = turn % len(self.ways)
                    for way in (*self.ways[first:], *self.ways[:first]):
                        way.times.setdefault(length, []).append(await way.ask(prompt))
                say(f"round {turn + 1} of {self.rounds}")
        finally:
            for way in self.ways:
                await way.client.stop()

    def prompt(self, length: int, turn: int) -> str:
        """Text of about so many tokens that no cache knows from its first word on."""
        words = (WORDS[(7 * at + at // len(WORDS) + turn) % len(WORDS)] for at in range(length))
        text = f"{turn}, {length}: {' '.join(words)}"
        tokens = self.codec.encode(text, add_special_tokens=True)
        return self.codec.tokenizer.decode(tokens[:length], skip_special_tokens=True)

    def report(self, where: str) -> None:
        """The table for people and the line for programs."""
        medians = {
            (way.world, way.chunked, length): statistics.median(times)
            for way in self.ways
            for length, times in way.times.items()
        }
        print(
            f"{where}\nstages with one thread each; medians of {self.rounds}, ms to first token\n"
        )
        print("| tokens | " + " | ".join(way.name for way in self.ways) + " |")
        print("|---:" * (1 + len(self.ways)) + "|")
        for length in self.lengths:
            cells = (f"{1000 * medians[w.world, w.chunked, length]:.0f}" for w in self.ways)
            print(f"| {length} | {' | '.join(cells)} |")
        print()
        found: dict[str, float] = {}
        predicted: dict[str, float] = {}
        for world in sorted({way.world for way in self.ways} - {1}):
            for length in self.lengths:
                name = f"w{world}_{length}"
                chunked = medians[world, True, length]
                found[name] = round(medians[world, False, length] / chunked, 3)
                found[f"{name}_vs_w1"] = round(medians[1, True, length] / chunked, 3)
                predicted[name] = round(self._predicted(world, length), 3)
                print(f"{name}: {found[name]:.2f}×", end="")
                print(f", {found[f'{name}_vs_w1']:.2f}× of one process", end="")
                print(f"; with a core for each stage {predicted[name]:.2f}× is predicted")
        cores = usable_cores()
        for world in sorted({way.world for way in self.ways}):
            if world > cores:
                print(f"{world} stages share {cores} cores here: what is measured is no pipeline's")
        line = {
            "bench": "prefill",
            "ratios": found,
            "predicted": predicted,
            "ms": {
                f"{way.name}, {length}": round(1000 * medians[way.world, way.chunked, length], 1)
                for way in self.ways
                for length in self.lengths
            },
            "cores": cores,
            "machine": where,
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)

    def _predicted(self, world: int, length: int) -> float:
        """Whole over chunked by the planner's own simulation, where a row costs the same always."""
        config = self.config
        chunks = prefill_chunks(
            length, world, config.num_sub_sequences, config.max_sub_sequence_len
        )
        layers = [float(n) for n in even_split(self.layers, world)]
        return makespan(layers, [length]) / makespan(layers, chunks)


def even_split(layers: int, world: int) -> list[int]:
    """Layers of each stage, as even as can be."""
    return [layers // world + (rank < layers % world) for rank in range(world)]
