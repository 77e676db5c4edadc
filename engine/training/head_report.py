"""`jupiter medusa eval`: how often each head is right, and what a step gains by it.

The engine answers the prompts greedily and with typical acceptance, with the tree in question;
then one forward over each greedy answer tells at every position where the true tokens stood among
each head's candidates.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.head_choices import best_choices, write_acceptance
from engine.checkpoint.sources import fetch
from engine.client import EngineClient
from engine.config import JupiterConfig, load_config
from engine.decoding.acceptance import CANDIDATES, Acceptance, calibrated
from engine.decoding.calibrate import MISS, tokens_per_step
from engine.errors import ConfigError, EngineError, ExitCode
from engine.model.config import ModelConfig
from engine.pipeline.batch import Entry, Judge
from engine.pipeline.build import Plan, build_stage, choose_device, make_plan
from engine.pipeline.run import load_codec
from engine.pipeline.stage import Stage
from engine.protocol import Failed, Finished, Message, SamplingParams, Tokens
from engine.training.args_medusa import EvalArguments
from engine.training.rows import Row, read_split, with_system

ROWS = 128
"""Passed through the model at a time."""
PUBLISHED = (0.560, 0.316, 0.201, 0.147, 0.118)
"""Top-1 accuracy of the 7B heads in Medusa's own table."""


@dataclass
class Answers:
    """What the engine wrote under one acceptance rule."""

    tokens: list[list[int]] = field(default_factory=list)
    steps: int = 0
    step_tokens: float = 0.0

    @property
    def mean_accepted_len(self) -> float | None:
        """Tokens emitted by decode steps / decode steps."""
        return self.step_tokens / self.steps if self.steps else None


def run(args: EvalArguments) -> int:
    """Print the table, then the same as one JSON line; returns the exit code."""
    config = report_config(args)
    prompts = read_prompts(args)
    folder = fetch(config.base_model_name_or_path, _say)
    plan = make_plan(config, folder)
    if plan.heads.num_heads == 0:
        raise ConfigError("there are no heads to evaluate; name them with --medusa_head_path")
    greedy, typical = asyncio.run(_answer(config, prompts, args))
    ranks = answer_ranks(plan, prompts, greedy.tokens)
    acceptance = calibrated(ranks, plan.heads.num_heads)
    figures = summarize(plan, greedy, typical, ranks, acceptance)
    print(table(figures))
    print(json.dumps(figures))
    if args.json is not None:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if args.calibrate and plan.heads_path is not None:
        _say(f"{write_acceptance(plan.heads_path, acceptance)}: acceptance stored")
    return ExitCode.OK


def report_config(args: EvalArguments) -> JupiterConfig:
    """The config with the model, heads and tree that the command line names."""
    assignments = []
    for key in ("medusa_head_path", "medusa_choices"):
        value = getattr(args, key)
        if value is not None:
            assignments.append(f"{key}={value}")
    config = load_config(args.config, assignments=assignments)
    if args.model is not None:
        layers = ModelConfig.from_folder(fetch(args.model, _say)).num_hidden_layers
        config = msgspec.structs.replace(
            config,
            base_model_name_or_path=args.model,
            stage_num_hidden_layers_list=[layers],
            model_keys={},
        )
    return config


def read_prompts(args: EvalArguments) -> list[tuple[Message, ...]]:
    """The first question of each row, with its system message."""
    rows = read_split(args.dataset, seed=args.seed)[: args.limit]
    return [_question(with_system(row, args.system)) for row in rows]


def _question(row: Row) -> tuple[Message, ...]:
    first = next((i for i, m in enumerate(row.messages) if m.role == "user"), None)
    if first is None:
        raise ConfigError(f"{row.where}: has no user message to ask")
    return row.messages[: first + 1]


async def _answer(
    config: JupiterConfig, prompts: Sequence[tuple[Message, ...]], args: EvalArguments
) -> tuple[Answers, Answers]:
    client = EngineClient(config)
    most = args.max_new_tokens
    temperature = config.temperature or 0.7
    typical = SamplingParams(max_tokens=most, temperature=temperature, seed=args.seed)
    try:
        await client.start()
        return (
            await _ask_all(client, prompts, SamplingParams(max_tokens=most, temperature=0)),
            await _ask_all(client, prompts, typical),
        )
    finally:
        await client.stop()


async def _ask_all(
    client: EngineClient, prompts: Sequence[tuple[Message, ...]], params: SamplingParams
) -> Answers:
    answers = Answers(tokens=[[] for _ in prompts])
    waiting = iter(enumerate(prompts))

    async def ask_some() -> None:
        for index, messages in waiting:
            async for event in client.submit(messages=messages, params=params):
                if isinstance(event, Tokens):
                    answers.tokens[index] += event.token_ids
                elif isinstance(event, Failed):
                    raise EngineError(f"prompt {index + 1}: {event.message}")
                elif isinstance(event, Finished):
                    metrics = event.metrics
                    answers.steps += metrics.decode_steps
                    answers.step_tokens += metrics.decode_steps * (metrics.mean_accepted_len or 0)
            _say(f"prompt {index + 1} of {len(prompts)} answered")

    async with asyncio.TaskGroup() as group:
        for _ in range(min(client.config.max_num_seqs, len(prompts))):
            group.create_task(ask_some())
    return answers


def answer_ranks(
    plan: Plan, prompts: Sequence[tuple[Message, ...]], answers: Sequence[list[int]]
) -> list[list[list[int]]]:
    """Per answer, position and head the rank of the true token, or MISS (see calibrate.py)."""
    whole = msgspec.structs.replace(
        plan.config, stage_num_hidden_layers_list=[plan.model.num_hidden_layers]
    )
    plan = make_plan(whole, plan.folder)
    stage = build_stage(plan, 0, choose_device(whole.device, 0), lambda done, total: None)
    codec = load_codec(plan)
    found = []
    for messages, answer in zip(prompts, answers, strict=True):
        prompt = codec.encode(codec.render(messages), add_special_tokens=False)
        found.append(_ranks(stage, prompt, answer))
    return found


@torch.inference_mode()
def _ranks(stage: Stage, prompt: list[int], answer: list[int]) -> list[list[int]]:
    """Computed as the stage computes: after packing, its modules may have no weights any more."""
    tokens = prompt + answer
    # From the prompt's last token on; behind the answer's last but one there is no more to guess.
    hidden = _hidden(stage, tokens)[len(prompt) - 1 : len(tokens) - 2]
    if not len(hidden):
        return []
    known = torch.tensor(tokens, device=stage.device)
    follow = known[len(prompt) :]
    drafts = torch.cat(
        [
            _drafts(stage, piece, follow[at : at + len(piece) + stage.model.heads.num_heads])
            for at, piece in zip(range(0, len(hidden), ROWS), hidden.split(ROWS), strict=True)
        ]
    )
    ranks = torch.full(drafts.shape[:2], MISS, device=stage.device)
    for head in range(drafts.shape[1]):
        truth = known[len(prompt) + 1 + head :][: len(hidden)]
        hits = drafts[: len(truth), head] == truth[:, None]
        ranks[: len(truth), head] = torch.where(hits.any(-1), hits.int().argmax(-1), MISS)
    return ranks.tolist()


def _drafts(stage: Stage, hidden: Tensor, follow: Tensor) -> Tensor:
    """Candidates of each head, int64 [n, heads, CANDIDATES]; what a head sees is what was written.

    follow: int64, the token behind the first of the n rows, and those after it.
    """
    heads = stage.model.heads
    if heads.kind != "hydra":
        return stage.forward.draft(hidden, follow[: len(hidden)], CANDIDATES)
    padded = torch.nn.functional.pad(follow, (0, len(hidden) + heads.num_heads - len(follow)))
    known = padded.unfold(0, heads.num_heads, 1)[: len(hidden), None]
    return torch.cat(
        [
            stage.forward.guess(head, hidden, known[..., : head + 1], CANDIDATES)
            for head in range(heads.num_heads)
        ],
        dim=1,
    )


def _hidden(stage: Stage, tokens: list[int]) -> Tensor:
    """Normed hidden states of all tokens, [len(tokens), hidden_size], in chunks as of prefill."""
    chunks = []
    for start in range(0, len(tokens), ROWS):
        chunk = tokens[start : start + ROWS]
        parents = list(range(-1, len(chunk) - 1))
        chunks.append(stage.run([Entry(0, start, chunk, parents, Judge.NONE)], None))
    return torch.cat(chunks)


def summarize(
    plan: Plan,
    greedy: Answers,
    typical: Answers,
    ranks: list[list[list[int]]],
    acceptance: Acceptance,
) -> dict[str, Any]:
    """The report as plain values; accuracies are shares of the positions with a true token."""
    heads = plan.heads.num_heads
    hits = [[0] * CANDIDATES for _ in range(heads)]
    totals = [0] * heads
    for positions in ranks:
        for at, position in enumerate(positions):
            for head, rank in enumerate(position):
                # A head that looks behind the answer's end is neither right nor wrong.
                if at + head >= len(positions):
                    continue
                totals[head] += 1
                if rank != MISS:
                    hits[head][rank] += 1
    best = best_choices(acceptance)
    return {
        "report": "medusa_heads",
        "model": plan.config.base_model_name_or_path,
        "heads": plan.config.medusa_head_path,
        "prompts": len(ranks),
        "answer_tokens": sum(map(len, greedy.tokens)),
        "top_k_accuracy": [
            [sum(row[: k + 1]) / total if total else None for k in range(CANDIDATES)]
            for row, total in zip(hits, totals, strict=True)
        ],
        "tree_size": None if plan.tuned else plan.tree.size,
        "tokens_per_step": {
            "greedy": greedy.mean_accepted_len,
            "typical": typical.mean_accepted_len,
        },
        "best_choices": best,
        "best_choices_tokens_per_step": {
            name: _number(tokens_per_step(ranks, choices)) for name, choices in best.items()
        },
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def table(figures: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{figures['prompts']} prompts, {figures['answer_tokens']} tokens of greedy answers",
        "",
        "head   "
        + "  ".join(f"top-{k:<2}" for k in range(1, CANDIDATES + 1))
        + "  published top-1",
    ]
    for head, shares in enumerate(figures["top_k_accuracy"]):
        cells = "  ".join("n/a   " if share is None else f"{share:.3f} " for share in shares)
        published = f"{PUBLISHED[head]:.3f}" if head < len(PUBLISHED) else ""
        lines.append(f"{head + 1:<6} {cells}  {published}")
    step = figures["tokens_per_step"]
    rules = f"{_shown(step['greedy'])} greedy, {_shown(step['typical'])} typical"
    size = figures["tree_size"]
    tree = "tuned tree" if size is None else f"tree of {size} nodes"
    lines += ["", f"{tree}: tokens per step {rules}"]
    for name, value in figures["best_choices_tokens_per_step"].items():
        lines.append(f"best {name} of these answers: {_shown(value)} greedy, if run")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def _say(line: str) -> None:
    print(line, file=sys.stderr)
