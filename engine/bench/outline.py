"""`jupiter bench outline`: list answers by outline beside the same ones written plainly.

One engine answers each prompt in both modes, in turns. What is compared is the time of a whole
answer over its tokens, as the tokenizer counts the finished text, so that a shorter answer wins
nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from engine.bench.command import positive, run_to_end, say
from engine.bench.machine import machine
from engine.bench.prefill import even_split
from engine.checkpoint.tokenizer import ensure_tokenizer
from engine.cli.options import add_config_options, config_of, model_folder
from engine.client import EngineClient, Update
from engine.config import JupiterConfig
from engine.decoding.outline import Parts
from engine.errors import EngineError, ExitCode
from engine.model.config import ModelConfig
from engine.protocol import (
    TELEMETRY_INTERVAL_S,
    EventEnvelope,
    Failed,
    Finished,
    Message,
    SamplingParams,
    StageSpans,
    Tokens,
)
from engine.text import TextCodec
from engine.timeline import Timeline, Window

# What people ask for in points. A small model answers most of them with a list by itself.
PROMPTS = (
    "How can I sleep better at night? Give me a list of tips.",
    "How do I prepare for a job interview? List the steps.",
    "Give me tips for learning a new language.",
    "List five ways to save money on groceries.",
    "Name three things to check before buying a used car.",
    "Give me some ideas for a birthday party for a ten year old.",
    "How do I repair a bicycle tyre with a small hole? Give me numbered steps.",
    "List six ways to save water at home.",
)
WARM_UP = "Give me a list of reasons to read books."
Mode = Literal["plain", "outline"]
MODES: tuple[Mode, Mode] = ("plain", "outline")


def main(words: Sequence[str]) -> int:
    """Run the bench; its last line is the JSON."""
    args = _parser().parse_args(words)
    config = config_of(args)
    folder = model_folder(config)
    model = ModelConfig.from_folder(folder)
    codec = TextCodec(folder, ensure_tokenizer(folder, say), model.eos_token_id)
    bench = Bench(config, codec, model.num_hidden_layers, args)
    if code := run_to_end(bench.run()):
        return code
    bench.report(machine(bench.world * args.threads, ("torch",)))
    return ExitCode.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jupiter bench outline", description=__doc__.split("\n")[0].partition(": ")[2]
    )
    add_config_options(parser)
    parser.add_argument("--prompts", type=positive, default=len(PROMPTS), metavar="N")
    parser.add_argument("--max_new_tokens", type=positive, default=384, metavar="N")
    parser.add_argument("--world", type=positive, metavar="N", help="stages; else 2, or --stages")
    parser.add_argument(
        "--threads", type=positive, default=1, metavar="N", help="of each stage (default 1)"
    )
    return parser


@dataclass
class Answer:
    """One answer as its asker saw it."""

    tokens: int
    seconds: float
    ttft_s: float
    points: int
    window: Window | None = None
    """What the stages did meanwhile, from the first point's first text on; of an outline."""


@dataclass
class Side:
    """All answers of one mode."""

    answers: list[Answer] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def ms_per_token(self) -> float:
        """Sums over sums, so that a long answer counts for more."""
        return 1000 * sum(answer.seconds for answer in self.answers) / max(1, self.tokens)

    @property
    def ttft_ms(self) -> float:
        """The median."""
        return 1000 * statistics.median(answer.ttft_s for answer in self.answers)


class Bench:
    """One engine, both modes in turns."""

    def __init__(
        self, config: JupiterConfig, codec: TextCodec, layers: int, args: argparse.Namespace
    ) -> None:
        split = config.stage_num_hidden_layers_list
        self.world = args.world or len(split)
        if self.world != len(split):
            split = even_split(layers, self.world)
        changes: dict[str, Any] = {
            "stage_num_hidden_layers_list": split,
            "num_threads": args.threads,
            "max_new_tokens": None,
            "max_steps": None,
        }
        self._client = EngineClient(
            msgspec.structs.replace(config, **changes), listener=self._on_update
        )
        self._codec, self._prompts = codec, PROMPTS[: args.prompts]
        self._max_tokens = args.max_new_tokens
        self._timeline = Timeline()
        self.sides = {mode: Side() for mode in MODES}

    def _on_update(self, update: Update) -> None:
        if isinstance(update, EventEnvelope) and isinstance(update.body, StageSpans):
            self._timeline.add(update.rank, update.body.spans)

    async def run(self) -> None:
        """Ask everything in both modes; the engine is not left running."""
        try:
            say(f"loading {self.world} stages")
            await self._client.start()
            for mode in MODES:
                await self._ask(WARM_UP, mode)
            for index, prompt in enumerate(self._prompts):
                for mode in MODES if index % 2 == 0 else MODES[::-1]:
                    self.sides[mode].answers.append(await self._ask(prompt, mode))
                latest = ", ".join(_told(mode, self.sides[mode].answers[-1]) for mode in MODES)
                say(f"{index + 1} of {len(self._prompts)}: {latest}")
        finally:
            await self._client.stop()

    async def _ask(self, prompt: str, mode: Mode) -> Answer:
        params = SamplingParams(max_tokens=self._max_tokens, temperature=0, mode=mode)
        parts, first, grown = Parts(), 0.0, 0.0
        began, asked_at = time.perf_counter(), time.time()
        stream = self._client.submit(messages=[Message("user", prompt)], params=params)
        async for event in stream:
            if isinstance(event, Failed):
                raise EngineError(event.message)
            if isinstance(event, Finished):
                break
            if isinstance(event, Tokens):
                parts.add(event.point, event.text)
                first = first or time.perf_counter() - began
                if event.point and not event.text.endswith("**:"):
                    grown = grown or time.perf_counter() - began
        seconds = time.perf_counter() - began
        tokens = len(self._codec.encode(parts.text, add_special_tokens=False))
        answer = Answer(tokens, seconds, first, sum(1 for point in parts.texts if point))
        if answer.points:
            await asyncio.sleep(2 * TELEMETRY_INTERVAL_S)  # the stages tell of the last of it
            answer.window = self._timeline.window(asked_at + grown, asked_at + seconds)
        return answer

    def report(self, where: str) -> None:
        """The figures for people and the line for programs."""
        plain, outline = (self.sides[mode] for mode in MODES)
        ratio = round(plain.ms_per_token / outline.ms_per_token, 3)
        of_lists = ratio_of_lists(plain, outline)
        stages = timeline_figures([a.window for a in outline.answers if a.window is not None])
        print(f"{where}; {self.world} stages")
        print(f"{len(self._prompts)} prompts (the project's own), greedy, ", end="")
        print(f"at most {self._max_tokens} new tokens\n")
        print("| mode | ms per answer token | tokens of all answers | first token, ms |")
        print("|---|---:|---:|---:|")
        for mode, side in self.sides.items():
            cells = f"{side.ms_per_token:.1f} | {side.tokens} | {side.ttft_ms:.0f}"
            print(f"| {mode} | {cells} |")
        listed = sum(answer.points > 0 for answer in outline.answers)
        print(f"\nlists: {listed} of {len(self._prompts)}, points of each: ", end="")
        print(", ".join(str(answer.points) for answer in outline.answers))
        print(f"while points grow: {told_timeline(stages)}")
        print(f"vs_plain: {ratio:.2f}×")
        if of_lists is not None:
            print(f"vs_plain_lists, of the answers that are lists: {of_lists:.2f}×")
        line = {
            "bench": "outline",
            "ratios": {"vs_plain": ratio, "vs_plain_lists": of_lists},
            "modes": {
                mode: {
                    "ms_per_token": round(side.ms_per_token, 3),
                    "tokens": [answer.tokens for answer in side.answers],
                    "ttft_ms": round(side.ttft_ms, 1),
                }
                for mode, side in self.sides.items()
            },
            "points": [answer.points for answer in outline.answers],
            "timeline": stages,
            "world": self.world,
            "machine": where,
            "max_new_tokens": self._max_tokens,
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)


def ratio_of_lists(plain: Side, outline: Side) -> float | None:
    """The ratio of those prompts alone whose outline answer is a list; None where none is.

    The others are written plainly in both modes.
    """
    pairs = zip(plain.answers, outline.answers, strict=True)
    lists = [(a, b) for a, b in pairs if b.points]
    if not lists:
        return None
    ours, theirs = Side([b for _, b in lists]), Side([a for a, _ in lists])
    return round(theirs.ms_per_token / ours.ms_per_token, 3)


def timeline_figures(windows: Sequence[Window]) -> dict[str, Any]:
    """What the stages did in all windows together, each weighed by its length.

    Busy share of each stage, and of the time in which all were busy at once; mean number of
    micro-batches in the air, and of each window the most points that were under way at once; None
    where nothing was measured.
    """
    seconds = sum(window.seconds for window in windows)
    if not seconds:
        return {"busy": None, "all_busy": None, "in_the_air": None, "points_at_once": []}
    count = max(len(window.stages) for window in windows)
    busy = [
        sum((window.busy(stage) or 0.0) * window.seconds for window in windows) / seconds
        for stage in range(count)
    ]
    air = sum((window.in_the_air() or 0.0) * window.seconds for window in windows) / seconds
    at_once = sum((window.all_busy() or 0.0) * window.seconds for window in windows) / seconds
    return {
        "busy": [round(share, 3) for share in busy],
        "all_busy": round(at_once, 3),
        "in_the_air": round(air, 3),
        "points_at_once": [window.points_at_once() for window in windows],
    }


def told_timeline(stages: dict[str, Any]) -> str:
    """The same for people."""
    if stages["busy"] is None:
        return "n/a"
    busy = ", ".join(f"stage {rank} {share:.0%}" for rank, share in enumerate(stages["busy"]))
    points = ", ".join(map(str, stages["points_at_once"]))
    return (
        f"busy {busy}, all at once {stages['all_busy']:.0%} (in lock-step never); "
        f"{stages['in_the_air']:.2f} micro-batches in the air; "
        f"points under way at once: {points}"
    )


def _told(mode: Mode, answer: Answer) -> str:
    rate = 1000 * answer.seconds / max(1, answer.tokens)
    return f"{mode} {answer.tokens} tokens, {rate:.1f} ms each"
