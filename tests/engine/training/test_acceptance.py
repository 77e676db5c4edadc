"""`jupiter medusa` from prompts to faster answers, on a tiny model."""

from __future__ import annotations

import json
import queue
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.heads import write_heads
from engine.cli.main import main
from engine.config import parse_config
from engine.pipeline.build import build_stage, make_plan
from engine.pipeline.run import run_rank
from engine.protocol import Event, Failed, Finished, Generate, Message, SamplingParams, Shutdown
from engine.protocol import Tokens as TokensEvent
from tests.engine.training.ranks import records, steps
from tests.tiny import tiny_folder

PROMPTS = [f"{word} {number}" for word in ("tell", "why", "count") for number in range(5)]
HEADS = 3


class Answers:
    """What the engine answers, with its heads if it has any."""

    def __init__(self, heads: Path | None) -> None:
        folder = tiny_folder(layers=2)
        values: dict[str, Any] = {
            "base_model_name_or_path": str(folder),
            "stage_num_hidden_layers_list": [2],
            "torch_dtype": "float32",
            "max_kv_cache_length": 200,
            "medusa_choices": [[0], [0, 0], [0, 0, 0]],
        }
        if heads is not None:
            values["medusa_head_path"] = str(heads)
        plan = make_plan(parse_config(values, "a test"), folder)
        stage = build_stage(plan, 0, torch.device("cpu"), lambda done, total: None)
        self.texts = dict.fromkeys(PROMPTS, "")
        self.figures: dict[str, Finished] = {}
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        params = SamplingParams(temperature=0, max_tokens=48)
        for prompt in PROMPTS:
            messages = (Message("user", prompt),)
            self.inbox.put(Generate(request_id=prompt, messages=messages, params=params))
        run_rank(plan, stage, 0, inbox=self.inbox, emit=self._take)

    def _take(self, event: Event) -> None:
        assert not isinstance(event, Failed), event
        if isinstance(event, TokensEvent):
            self.texts[event.request_id] += event.text
        if isinstance(event, Finished):
            self.figures[event.request_id] = event
            if len(self.figures) == len(PROMPTS):
                self.inbox.put(Shutdown())

    @property
    def tokens_per_step(self) -> float:
        """Over all prompts."""
        metrics = [done.metrics for done in self.figures.values()]
        emitted = sum((m.mean_accepted_len or 0) * m.decode_steps for m in metrics)
        return emitted / sum(m.decode_steps for m in metrics)


def untrained_heads(folder: Path) -> Path:
    """ResBlocks that change nothing in front of the model's own lm_head."""
    tensors = {}
    for head in range(HEADS):
        tensors[f"medusa_head.{head}.0.linear.weight"] = torch.zeros(32, 32)
        tensors[f"medusa_head.{head}.0.linear.bias"] = torch.zeros(32)
    write_heads(folder, tensors, "v2")
    return folder


@pytest.mark.parametrize("kind", ["resblock", "root", "hydra"])
def test_trained_heads_are_accepted_far_more_often_and_change_no_answer(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Answers(None)
    rows = [
        {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": plain.texts[prompt]},
            ]
        }
        for prompt in PROMPTS
    ]
    dataset = tmp_path / "answers.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # fmt: off
    code = main([
        "medusa", "--model", str(tiny_folder(layers=2)), "--dataset", str(dataset),
        "--save", str(tmp_path / "runs"), "--split_dataset_ratio", "0", "--eval_iters", "0",
        "--medusa_num_heads", str(HEADS), "--global_batch_size", "5", "--micro_batch_size", "5",
        "--train_iters", "150", "--medusa_lr", "2e-2", "--lr_warmup_iters", "5",
        "--cache_hidden_states", str(tmp_path / "hidden"), "--original_lm_head", "false",
        "--medusa_head_kind", kind,
    ])
    # fmt: on
    assert code == 0
    run = Path(capsys.readouterr().out.splitlines()[-1])
    losses = [step["loss"] for step in steps(run)]
    assert losses[-1] < 0.3 * losses[0]
    assert min(records(run)[-1]["accuracy_per_head"]) > 0.6

    before = Answers(untrained_heads(tmp_path / "untrained"))
    after = Answers(run / "heads")
    assert plain.tokens_per_step == 1
    assert before.tokens_per_step < 1.5
    assert after.tokens_per_step > 2
    assert plain.texts == before.texts == after.texts
