"""A finished run's heads in the chat: the config for them, and what they bring, measured there.

Before and after the switch the engine answers the same questions greedily. Its answers are the
base model's own either way, so the figures differ by the heads alone. Free of Textual and torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from engine.checkpoint.sources import resolve_cached
from engine.config import JupiterConfig
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.model.config import ModelConfig
from engine.protocol import Failed, Finished, Message, Metrics, SamplingParams, Tokens
from engine.training.args import TrainArguments
from engine.training.args_fields import arguments
from engine.training.rows import Row, read_questions, read_split, with_system
from tui.run_folders import RunFolder

if TYPE_CHECKING:
    from tui.session import EngineSession

MOST_QUESTIONS = 8
MOST_TOKENS = 64
GREEDY = SamplingParams(max_tokens=MOST_TOKENS, temperature=0.0)
Questions = tuple[tuple[Message, ...], ...]


def config_with(config: JupiterConfig, run: RunFolder) -> JupiterConfig:
    """The chat's config with the heads of a finished run, and with its base where that differs.

    Raises:
        ConfigError, CheckpointError: the run has no heads, or its base model is not here.
    """
    if run.heads is None:
        raise ConfigError(f"{run.path}: has no heads; they are written when a run is over")
    choices = config.medusa_choices if isinstance(config.medusa_choices, str) else "auto"
    changed = replace(
        config,
        medusa_head_path=str(run.heads),
        medusa_num_heads=None,
        medusa_num_layers=None,
        medusa_choices=choices,
    )
    base = str(run.base) if run.base is not None else _base_of(run)
    if base is None or resolve_cached(base) == resolve_cached(config.base_model_name_or_path):
        return changed
    folder = resolve_cached(base)
    if folder is None:
        raise CheckpointError(f"{base}: not on this machine; run `jupiter fetch {base}`")
    layers = ModelConfig.from_folder(folder).num_hidden_layers
    split = config.stage_num_hidden_layers_list
    return replace(
        changed,
        base_model_name_or_path=base,
        stage_num_hidden_layers_list=split if sum(split) == layers else _even(layers, len(split)),
        model_keys={},
    )


def _base_of(run: RunFolder) -> str | None:
    """The base model that the heads were trained on, as their own config names it."""
    assert run.heads is not None
    try:
        values = json.loads((run.heads / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = {}
    named = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    return named or run.args.get("model")


def _even(layers: int, stages: int) -> list[int]:
    stages = min(stages, layers)
    return [layers // stages + (rank < layers % stages) for rank in range(stages)]


# --- the questions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Questions to measure on, and in words where they are from."""

    questions: Questions
    origin: str


def sample(run: RunFolder) -> Sample:
    """Some questions of the run's own data: held-out ones where there are any.

    Raises:
        JupiterError: the data files are gone, or hold no questions.
    """
    known = arguments(TrainArguments)
    told = {name: run.args.get(name, known[name].default) for name in known}
    specs = [*told["dataset"], *told["val_dataset"]]
    asked = read_questions(told["batch_input"]) if told["batch_input"] else None
    if told["val_dataset"]:
        rows = read_split(told["val_dataset"], seed=told["seed"], questions=asked)
        origin = "rows for evaluation, which the heads were not trained on"
    else:
        share = told["split_dataset_ratio"]
        rows = read_split(
            told["dataset"], seed=told["seed"], split="eval", held_out=share, questions=asked
        )
        origin = "rows held out, which the heads were not trained on"
        if not rows:
            rows = read_split(told["dataset"], seed=told["seed"], questions=asked)
            origin = "rows that the heads were trained on: on others they may be right less often"
    found = [question for row in rows if (question := _question(row, told["system"]))]
    if not found:
        raise ConfigError(f"{' '.join(specs)}: no row has a question, so nothing can be measured")
    return Sample(tuple(found[:MOST_QUESTIONS]), origin)


def _question(row: Row, system: str | None) -> tuple[Message, ...]:
    messages = with_system(row, system).messages
    first = next((at for at, message in enumerate(messages) if message.role == "user"), None)
    return () if first is None else messages[: first + 1]


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What the engine did over some answers."""

    heads: int
    tree_size: int | None
    """None where it was tuned all the while."""
    answers: tuple[tuple[int, ...], ...]
    """Token ids of each answer."""
    steps: int
    """Decode steps."""
    step_tokens: float
    """Tokens that they emitted."""
    step_s: float
    """Seconds that they took; 0 where nothing was measured."""
    proposed: tuple[int, ...]
    accepted: tuple[int, ...]

    @property
    def tokens_per_step(self) -> float | None:
        return self.step_tokens / self.steps if self.steps else None

    @property
    def tokens_per_s(self) -> float | None:
        return self.step_tokens / self.step_s if self.step_s else None


async def measure(
    session: EngineSession, questions: Questions, progress: Callable[[int, int], None]
) -> Measured:
    """Have the engine answer the questions greedily, one after the other.

    Raises:
        EngineError: the engine has died, or cannot answer one of them.
    """
    answers, figures = [], []
    for number, question in enumerate(questions):
        progress(number, len(questions))
        ids: list[int] = []
        async for event in session.ask(question, params=GREEDY):
            if isinstance(event, Tokens):
                ids += event.token_ids
            elif isinstance(event, Failed):
                raise EngineError(f"question {number + 1}: {event.message}")
            elif isinstance(event, Finished):
                figures.append(event.metrics)
        answers.append(tuple(ids))
    ready = session.snapshot.ready
    if ready is None:
        raise EngineError("the engine is not ready")
    tree_size = None if ready.tree_tuned else ready.tree_size
    return _sum(answers, figures, ready.medusa_num_heads, tree_size)


def _sum(
    answers: Sequence[tuple[int, ...]],
    figures: Sequence[Metrics],
    heads: int,
    tree_size: int | None,
) -> Measured:
    tokens = [each.decode_steps * (each.mean_accepted_len or 0.0) for each in figures]
    seconds = [
        count / each.tokens_per_s if each.tokens_per_s else 0.0
        for count, each in zip(tokens, figures, strict=True)
    ]
    return Measured(
        heads=heads,
        tree_size=tree_size,
        answers=tuple(answers),
        steps=sum(each.decode_steps for each in figures),
        step_tokens=sum(tokens),
        step_s=sum(seconds),
        proposed=_columns([each.proposed_per_head for each in figures]),
        accepted=_columns([each.accepted_per_head for each in figures]),
    )


def _columns(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip_longest(*rows, fillvalue=0)))


def same_answers(before: Measured, after: Measured) -> bool:
    """Whether both wrote the same tokens, so that the figures compare like with like."""
    return before.answers == after.answers


def heads_name(config: JupiterConfig, number: int | None = None) -> str:
    """The heads of a config in a few words; `number` is how many the engine has, if it is known."""
    if config.medusa_head_path is None:
        return f"{number}, of the model itself" if number else "none"
    path = Path(config.medusa_head_path)
    return f"{path.parent.name}/{path.name}" if path.name == "heads" else path.name
