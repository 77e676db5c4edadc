"""Speculation on the screen with live stages and real heads: what is shown is what happened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from textual.pilot import Pilot

from engine.checkpoint.heads import write_heads
from engine.config import JupiterConfig, parse_config
from engine.protocol import EventEnvelope, Finished, SamplingParams
from engine.updates import Update
from tests.tiny import tiny_folder
from tui.app import JupiterApp
from tui.conversation import Ending
from tui.speculation import Acceptance, of_metrics
from tui.widgets.token_text import TokenText

DEADLINE_S = 60.0
HEADS = 3


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JupiterConfig:
    """Two stages with heads that repeat the next token's guesses: right now and then."""
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "state"))
    tensors = {}
    for head in range(HEADS):
        tensors[f"medusa_head.{head}.0.linear.weight"] = torch.zeros(32, 32)
        tensors[f"medusa_head.{head}.0.linear.bias"] = torch.zeros(32)
    write_heads(tmp_path / "heads", tensors, layout="v2")
    values = {
        "base_model_name_or_path": str(tiny_folder()),
        "stage_num_hidden_layers_list": [3, 3],
        "medusa_head_path": str(tmp_path / "heads"),
        "medusa_choices": "mc_63",
        "temperature": 0,
        "device": "cpu",
        "num_threads": 1,
    }
    return parse_config(values, "test")


async def until(app: JupiterApp, pilot: Pilot[int], condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            if app._exception is not None:
                raise app._exception
            await pilot.pause(0.02)


async def test_shown_tokens_trees_and_acceptance_are_the_engines(config: JupiterConfig) -> None:
    app = JupiterApp(config)
    async with app.run_test(size=(150, 50)) as pilot:
        chat = app.chat
        await until(app, pilot, lambda: chat.snapshot and chat.snapshot.phase == "ready")
        chat.conversation.params = SamplingParams(max_tokens=60)
        figures: list[Acceptance] = []
        app.session.add_listener(lambda update: _note(figures, update))
        await _ask(app, pilot)
        await pilot.press("ctrl+s")
        await _ask(app, pilot)
        first, second = (node for node in chat.conversation.path() if node.is_answer)
        (text,) = chat.query(TokenText)
        trace = text.trace
        assert "".join(token.text for token in trace.tokens) == second.text
        assert trace.acceptance == figures[1]
        assert trace.acceptance.accepted[0] > 0
        assert chat.speculation.speculation.whole == figures[0] + figures[1]
        assert first.ending is second.ending is Ending.LENGTH
        for token in trace.tokens:
            step = trace.steps[token.step]
            assert token.own in (step.texts if token.head else [step.next_text])
        drafted = next(i for i, token in enumerate(trace.tokens) if token.head == 1)
        text.cursor = drafted
        await until(app, pilot, lambda: f"token {drafted + 1}/{len(trace.tokens)}" in _shown(app))
        assert "head 1 ✓" in _shown(app)
        assert "head 3 ✗" in _shown(app)
        await app.leave(0)


def _note(figures: list[Acceptance], update: Update) -> None:
    """The engine's own figures of each answer, as they come from the worker."""
    if isinstance(update, EventEnvelope) and isinstance(update.body, Finished):
        figures.append(of_metrics(update.body.metrics))


async def _ask(app: JupiterApp, pilot: Pilot[int]) -> None:
    chat = app.chat
    answers = len(chat.conversation.nodes) // 2
    await pilot.press(*"go", "enter")
    await until(
        app,
        pilot,
        lambda: len(chat.conversation.nodes) // 2 > answers and chat.running is None,
    )


def _shown(app: JupiterApp) -> str:
    screen = app.screen
    lines = screen._compositor.render_strips(screen.size)
    return "\n".join(strip.text.rstrip() for strip in lines)
