"""`jupiter bench network`: our pipeline over slow links, beside a lock-step pipeline and tensor
parallelism of the same model.

Three machines each, as network namespaces of this one, over links of 100 Mbit/s and 1 Gbit/s, and
of 1 Gbit/s with a millisecond on the way. All answer the same prompts greedily, in turns, in one
run; what counts is the time of a whole answer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from msgspec.structs import replace

from engine.bench.network.rig import Rig, address, enter, missing
from engine.bench.network.tensor_shape import WORLD, check_cut
from engine.bench.prompts import OWN
from engine.cli.options import add_config_options, config_of, model_folder
from engine.config import JupiterConfig, config_json
from engine.errors import EngineError, ExitCode
from engine.launch import module_environment
from engine.model.config import ModelConfig

PAPER = {"vs_lockstep": 2.5, "vs_tensor_parallel": 26.1}
"""Of 7B models at 100 Mbit/s: the plain pipeline, and Megatron's tensor parallelism."""
OTHERS = {"vs_lockstep": "lockstep", "vs_tensor_parallel": "tensor"}
PORT = 23100
STOP_S = 20.0


@dataclass(frozen=True)
class Wire:
    """What the links are like."""

    mbit: int
    latency_ms: float = 0.0
    """Each way, beside the machine's own."""

    def __str__(self) -> str:
        return f"{self.mbit} Mbit/s" + (f", {self.latency_ms:g} ms" if self.latency_ms else "")

    @property
    def key(self) -> str:
        """In the names of ratios."""
        rate = f"{self.mbit // 1000}gbit" if self.mbit % 1000 == 0 else f"{self.mbit}mbit"
        return rate + (f"_{self.latency_ms:g}ms" if self.latency_ms else "")


WIRES = (Wire(100), Wire(1000), Wire(1000, 1.0))
Answers = dict[Wire, dict[str, list[dict[str, Any]]]]


@dataclass
class Player:
    """One engine: a process for each rank, each in a namespace."""

    name: str
    kind: str
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    errors: list[IO[str]] = field(default_factory=list)

    def start(self, rig: Rig, config: JupiterConfig, folder: Path, port: int) -> None:
        """Start its ranks; `read` tells when rank 0 is ready."""
        config = replace(config, init_method=f"tcp://{address(0)}:{port}")
        environment = {**os.environ, **module_environment(), "OMP_NUM_THREADS": "1"}
        environment["OMP_WAIT_POLICY"] = "passive"
        for rank in range(rig.ranks):
            words = [sys.executable, "-m", "engine.owned", str(os.getpid())]
            words += ["engine.bench.network.rank", self.kind, str(rank), str(folder)]
            error = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `stop`)
            self.errors.append(error)
            self.processes.append(
                subprocess.Popen(
                    rig.command(rank, [*words, config_json(config)]),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=error,
                    text=True,
                    env=environment,
                )
            )

    def ask(self, text: str, max_tokens: int) -> dict[str, Any]:
        """One answer: seconds, tokens, prompt tokens. Raises EngineError."""
        first = self.processes[0]
        assert first.stdin is not None
        print(json.dumps({"text": text, "max_tokens": max_tokens}), file=first.stdin, flush=True)
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next line of rank 0; raises EngineError with a rank's last words."""
        first = self.processes[0]
        assert first.stdout is not None
        line = first.stdout.readline()
        values: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in values:
            raise EngineError(f"{self.name}: {values['error']}")
        return values

    def _last_words(self) -> str:
        for rank, error in enumerate(self.errors):
            error.seek(0)
            lines = error.read().strip().splitlines()
            if lines and self.processes[rank].poll() not in (None, 0):
                return f"rank {rank}: {lines[-1]}"
        return "rank 0 has ended"

    def stop(self) -> None:
        """End all its ranks, by the end of rank 0's input or else by force."""
        if self.processes and self.processes[0].stdin is not None:
            self.processes[0].stdin.close()
        for process in self.processes:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for error in self.errors:
            error.close()


def main(words: Sequence[str]) -> int:
    """Run the bench; its last line is the JSON."""
    args = _parser().parse_args(words)
    config = config_of(args)
    folder = model_folder(config)
    if reason := missing():
        print(f"skipped: {reason}")
        print(json.dumps({"bench": "network", "ratios": {}, "reason": reason}), flush=True)
        return ExitCode.OK
    model = ModelConfig.from_folder(folder)
    check_cut(model)
    enter(["bench", "network", *words])
    layers, rest = divmod(model.num_hidden_layers, WORLD)
    config = replace(
        config,
        stage_num_hidden_layers_list=[layers + (rank < rest) for rank in range(WORLD)],
        num_stages=None,
        num_threads=1,
        max_new_tokens=None,
        max_steps=None,
        device="cpu",
        torch_dtype="float32",
        load_in_8bit=args.int8,
        load_in_4bit=False,
        sampling="greedy",
    )
    prompts = make_prompts(args.prompts, args.words)
    answers = _measure(args, config, folder, prompts)
    _report(args, config, answers)
    return ExitCode.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jupiter bench network",
        description="our pipeline beside lock-step and tensor parallelism over shaped links",
    )
    add_config_options(parser)
    parser.add_argument("--prompts", type=int, default=4, metavar="N")
    parser.add_argument("--words", type=int, default=200, metavar="N", help="of a prompt, about")
    parser.add_argument("--max_new_tokens", type=int, default=64, metavar="N")
    parser.add_argument("--mbit", type=int, action="append", metavar="N", help="repeatable")
    parser.add_argument(
        "--latency_ms",
        type=_milliseconds,
        default=0.0,
        metavar="MS",
        help="each way, over the links of --mbit (1000)",
    )
    parser.add_argument(
        "--rounded",
        choices=("auto", "bfloat16", "int8"),
        help="our pipeline once more, with hidden states rounded on the links",
    )
    parser.add_argument(
        "--int8", action="store_true", help="both pipelines in int8; tensor parallelism is float32"
    )
    return parser


def _milliseconds(text: str) -> float:
    ms = float(text)
    if not 0 <= ms <= 1000:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1000, not {text}")
    return ms


def make_prompts(count: int, words: int) -> list[str]:
    """Questions of about so many words, each with another beginning."""
    found = []
    for number in range(count):
        asked = [*OWN[number % len(OWN) :], *OWN[: number % len(OWN)]]
        text, turn = f"Task {number + 1}.", 0
        while len(text.split()) < words:
            text += f" {asked[turn % len(asked)]}"
            turn += 1
        found.append(text)
    return found


def _measure(
    args: argparse.Namespace, config: JupiterConfig, folder: Path, prompts: Sequence[str]
) -> Answers:
    """Answers by links and player, in turns."""
    rates = args.mbit or ([1000] if args.latency_ms else [])
    wires = [Wire(mbit, args.latency_ms) for mbit in rates] or WIRES
    players = [Player(name, name) for name in ("jupiter", "lockstep", "tensor")]
    if args.rounded:
        players.append(Player(f"jupiter, {args.rounded} links", "jupiter"))
    rig = Rig(WORLD)
    answers: Answers = {}
    with ExitStack() as stack:
        stack.callback(rig.delay, 0)
        rig.shape(wires[0].mbit)  # "auto" measures it as the stages come together
        for index, player in enumerate(players):
            _say(f"loading {player.name}")
            stack.callback(player.stop)
            # Greedy by config would keep "auto" from rounding; each question asks for it anyhow.
            rounded = replace(config, link_dtype=args.rounded, sampling="typical")
            player.start(rig, rounded if index == 3 else config, folder, PORT + index)
            player.read()
        for wire in wires:
            rig.shape(wire.mbit)
            rig.delay(wire.latency_ms)
            found = answers[wire] = {player.name: [] for player in players}
            for player in players:
                player.ask("What is a pipeline?", 8)  # not counted
            for turn, text in enumerate(prompts):
                order = turn % len(players)
                for player in [*players[order:], *players[:order]]:
                    found[player.name].append(player.ask(text, args.max_new_tokens))
                told = ", ".join(f"{n} {a[-1]['seconds']:.2f} s" for n, a in found.items())
                _say(f"{wire}, {turn + 1} of {len(prompts)}: {told}")
    return answers


def _report(
    args: argparse.Namespace,
    config: JupiterConfig,
    answers: Answers,
) -> None:
    from engine.bench.machine import machine

    where = machine(1, ("torch",))
    numbers = "int8 (tensor parallelism float32)" if args.int8 else "float32"
    some = next(iter(answers.values()))["jupiter"]
    print(where)
    print(
        f"{WORLD} ranks in network namespaces on one machine, one thread each; {numbers}; "
        f"{len(some)} prompts of {some[0]['prompt']} tokens, at most {args.max_new_tokens} new\n"
    )
    print("| links | engine | seconds per answer | ms per token | same tokens as jupiter |")
    print("|---|---|---:|---:|---:|")
    ratios: dict[str, float] = {}
    for wire, found in answers.items():
        ours = found["jupiter"]
        for name, theirs in found.items():
            seconds = statistics.fmean(each["seconds"] for each in theirs)
            tokens = sum(len(each["tokens"]) for each in theirs)
            per_token = 1000 * sum(each["seconds"] for each in theirs) / tokens
            same = sum(a["tokens"] == b["tokens"] for a, b in zip(theirs, ours, strict=True))
            form = f" ({theirs[0]['link']})" if name.endswith("links") else ""
            figures = f"{seconds:.2f} | {per_token:.1f} | {same} of {len(ours)}"
            print(f"| {wire} | {name}{form} | {figures} |")
        for ratio, name in OTHERS.items():
            # Per token, so that an answer that ends sooner wins nothing.
            pairs = zip(found[name], ours, strict=True)
            ratios[f"{ratio}_{wire.key}"] = round(
                statistics.geometric_mean(_token_s(a) / _token_s(b) for a, b in pairs), 3
            )
    print()
    for name, value in ratios.items():
        paper = PAPER.get(name.removesuffix("_100mbit"))
        beside = f" (the paper, 7B: {paper}×)" if paper else ""
        print(f"{name}: {value:.2f}×{beside}")
    line = {
        "bench": "network",
        "ratios": ratios,
        "paper": {f"{name}_100mbit": value for name, value in PAPER.items()},
        "seconds": {
            wire.key: {name: [round(a["seconds"], 4) for a in each] for name, each in found.items()}
            for wire, found in answers.items()
        },
        "machine": where,
        "dtype": numbers,
    }
    print(json.dumps(line), flush=True)


def _token_s(answer: dict[str, Any]) -> float:
    return float(answer["seconds"] / len(answer["tokens"]))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
