"""Another split in the middle of a conversation, on live stages: not a token is different."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from msgspec.structs import replace

from engine.checkpoint.heads import write_heads
from engine.client import Update
from engine.config import JupiterConfig, load_config, parse_config
from engine.continuity import AnswerStream
from engine.errors import EngineError
from engine.protocol import (
    EventEnvelope,
    Finished,
    Message,
    SamplingParams,
    StageState,
    Tokens,
    Transcript,
)
from tests.e2e.terminal import CTRL_Q, ENTER, JUPITER_TUI, ROOT, Terminal
from tests.e2e.test_chat import answer_tokens
from tests.tiny import tiny_folder
from tui.conversation import Node
from tui.messages import EngineChanged
from tui.session import EngineSession
from tui.store import ConversationStore

SHORT = SamplingParams(temperature=0, max_tokens=40)
LONG = SamplingParams(temperature=0, max_tokens=240)
# Tokens after which an answer is under way, and far from its end.
EARLY = 10


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "state"))


def tiny(split: list[int], **values: Any) -> JupiterConfig:
    base = {"base_model_name_or_path": str(tiny_folder()), "device": "cpu", "num_threads": 1}
    return parse_config({**base, "stage_num_hidden_layers_list": split, **values}, "a test")


class Talk:
    """A conversation over a session, as the chat holds it."""

    def __init__(self, config: JupiterConfig) -> None:
        self.session = EngineSession(config, self._post)
        self.messages: list[Message] = []
        self.transcript: Transcript | None = None
        self.answers: list[list[int]] = []
        self.splits: list[tuple[tuple[int, ...], int]] = []
        """Each split, and how many tokens of the running answer there were when it came."""
        self.done: Finished
        self._grown = asyncio.Event()

    def _post(self, message: Any) -> None:
        if isinstance(message, EngineChanged) and message.snapshot.ready is not None:
            split = message.snapshot.split
            if not self.splits or self.splits[-1][0] != split:
                self.splits.append((split, len(self.answers[-1]) if self.answers else 0))

    def ask(self, text: str, params: SamplingParams = SHORT) -> Coroutine[Any, Any, None]:
        """Begin a turn; the result follows it to its end."""
        self.messages.append(Message("user", text))
        self.answers.append([])
        stream = self.session.ask(self.messages, params=params, transcript=self.transcript)
        return self._follow(stream)

    async def _follow(self, stream: AnswerStream) -> None:
        answer = ""
        async for event in stream:
            if isinstance(event, Tokens):
                self.answers[-1] += event.token_ids
                answer += event.text
                self._grown.set()
            elif isinstance(event, Finished):
                self.done = event
        self.messages.append(Message("assistant", answer))
        self.transcript = self.done.transcript

    async def grown(self, count: int) -> None:
        """Wait until the running answer has so many tokens."""
        while len(self.answers[-1]) < count:
            self._grown.clear()
            await self._grown.wait()


@asynccontextmanager
async def talk(config: JupiterConfig) -> AsyncIterator[Talk]:
    started = Talk(config)
    try:
        await started.session.start()
        assert started.session.error is None
        yield started
    finally:
        await started.session.stop()
    assert not psutil.Process().children(recursive=True)


async def undisturbed(config: JupiterConfig, turns: Sequence[tuple[str, SamplingParams]]) -> Talk:
    async with talk(config) as whole:
        for text, params in turns:
            await whole.ask(text, params)
    return whole


def heads(folder: Path) -> dict[str, Any]:
    """Three heads whose ResBlocks are zero: right where text repeats itself."""
    tensors = {}
    for head in range(3):
        tensors[f"medusa_head.{head}.0.linear.weight"] = torch.zeros(32, 32)
        tensors[f"medusa_head.{head}.0.linear.bias"] = torch.zeros(32)
    write_heads(folder, tensors, layout="v2")
    return {"medusa_head_path": str(folder), "medusa_choices": "mc_63"}


async def test_a_conversation_goes_on_over_new_splits_and_heads(tmp_path: Path) -> None:
    turns = [("hello", SHORT), ("count to ten", LONG), ("and now?", SHORT)]
    whole = await undisturbed(tiny([3, 3]), turns)
    async with talk(tiny([3, 3])) as split:
        await split.ask(*turns[0])
        await split.session.apply(tiny([2, 2, 2]))
        async with asyncio.TaskGroup() as group:
            group.create_task(split.ask(*turns[1]))
            await split.grown(EARLY)
            await split.session.apply(tiny([6], **heads(tmp_path / "heads")))
        done = split.done
        await split.ask(*turns[2])
    assert [name for name, _ in split.splits] == [(3, 3), (2, 2, 2), (6,)]
    assert EARLY <= split.splits[2][1] < LONG.max_tokens
    assert split.answers == whole.answers
    assert split.messages == whole.messages
    assert done.completion_tokens == len(whole.answers[1])
    # The first part made one token a step, the second took those of the heads.
    assert done.metrics.decode_steps < len(whole.answers[1]) - 2
    assert done.metrics.mean_accepted_len > 1


async def test_layers_move_between_the_stages_that_run_without_an_answer_noticing(
    tmp_path: Path,
) -> None:
    splits = [[1, 3, 2], [4, 1, 1], [1, 1, 4], [2, 2, 2]]
    turns = [("count to ten", LONG), ("and now?", SHORT)]
    drafts = heads(tmp_path / "heads")
    whole = await undisturbed(tiny([2, 2, 2], **drafts), turns)
    async with talk(tiny([2, 2, 2], **drafts)) as split:
        pids = {state.pid for state in split.session.snapshot.stages.values()}
        async with asyncio.TaskGroup() as group:
            group.create_task(split.ask(*turns[0]))
            for number, layers in enumerate(splits):
                await split.grown(EARLY + number)
                await split.session.apply(tiny(layers, **drafts))
        assert {state.pid for state in split.session.snapshot.stages.values()} == pids
        counts = [split.session.snapshot.stages[rank].num_layers for rank in range(3)]
        assert counts == splits[-1]
        await split.ask(*turns[1])
        assert split.done.cached_tokens > 0  # the rows went along
    assert [list(name) for name, _ in split.splits] == [[2, 2, 2], *splits]
    assert split.splits[1][1] < len(whole.answers[0])
    assert split.answers == whole.answers


async def test_a_stage_killed_in_its_start_brings_the_old_split_and_the_answer_back() -> None:
    whole = await undisturbed(tiny([3, 3]), [("count to ten", LONG)])
    async with talk(tiny([3, 3])) as split:
        victims: list[int] = []

        def kill_one(update: Update) -> None:
            if split.session.snapshot.split != (2, 2, 2) or victims:
                return
            body = update.body if isinstance(update, EventEnvelope) else None
            if isinstance(body, StageState) and body.first_layer == 2 and body.phase == "loading":
                victims.append(body.pid)
                os.kill(body.pid, signal.SIGKILL)

        split.session.add_listener(kill_one)
        async with asyncio.TaskGroup() as group:
            group.create_task(split.ask("count to ten", LONG))
            await split.grown(EARLY)
            with pytest.raises(EngineError, match=r"SIGKILL.*back on \[3, 3\]"):
                await split.session.apply(tiny([2, 2, 2]))
            assert victims
            assert split.session.snapshot.phase == "ready"
        assert split.answers == whole.answers


F2, F3 = "\x1bOQ", "\x1bOR"
START_S, ANSWER_S = 120.0, 120.0
TURNS = (
    "What is the capital of France?",
    "Tell me a long story about a cat 🐱 and a dog.",
    "What was the story about?",
)


async def test_the_workbench_changes_the_split_under_a_conversation(
    default_model: Path, tmp_path: Path
) -> None:
    # In float32: int8 answers are over before the split can change under them.
    greedy = {"temperature": 0.0, "max_new_tokens": 250, "load_in_8bit": False}
    config = replace(load_config(str(ROOT / "config.json")), **greedy)
    turns = [(text, SamplingParams()) for text in TURNS]
    whole = await undisturbed(config, turns)
    told = await asyncio.to_thread(through_three_splits, tmp_path / "state", greedy)
    assert [node.text for node in told] == [m.content for m in whole.messages]
    # All tokens of the conversation.
    assert whole.transcript is not None and whole.transcript.text
    assert told[-1].transcript == whole.transcript


def show(terminal: Terminal, key: str, what: str) -> None:
    """Go to another main screen, where `what` is to be seen."""
    terminal.send(key)
    terminal.wait_for(what)


def through_three_splits(state: Path, config: dict[str, Any]) -> list[Node]:
    """The turns in a real terminal, over 15|15, 10|10|10 and 30; the conversation as saved."""
    settings = [
        word for key, value in config.items() for word in ("--set", f"{key}={json.dumps(value)}")
    ]
    with Terminal([JUPITER_TUI, "--config", "config.json", *settings], state) as terminal:
        terminal.wait_for("● ready", START_S)
        terminal.send(TURNS[0] + ENTER)
        terminal.wait_for("● answering", ANSWER_S)
        terminal.wait_for("● ready", ANSWER_S)
        show(terminal, F3, "15 layers  15–29")
        terminal.send("ae")  # one stage more, all alike
        terminal.wait_for("10 layers  20–29")
        show(terminal, F2, TURNS[0])
        terminal.send(TURNS[1] + ENTER)
        terminal.wait_for(lambda screen: answer_tokens(screen) > EARLY, ANSWER_S)
        show(terminal, F3, "10 layers  20–29")
        terminal.send(ENTER)
        terminal.wait_for("The engine runs 10|10|10", START_S)
        terminal.send("dd")  # and now a single one
        terminal.wait_for("30 layers  0–29")
        show(terminal, F2, TURNS[1])
        assert "● answering" in terminal.screen
        show(terminal, F3, "30 layers  0–29")
        terminal.send(ENTER)
        terminal.wait_for("The engine runs 30", START_S)
        show(terminal, F2, TURNS[1])
        terminal.wait_for("● ready", ANSWER_S)
        terminal.send(TURNS[2] + ENTER)
        terminal.wait_for("● answering", ANSWER_S)
        terminal.wait_for("● ready", ANSWER_S)
        terminal.send(CTRL_Q)
        assert terminal.wait_exit() == 0
        terminal.wait_gone()
    (file,) = (state / "conversations").iterdir()
    saved = ConversationStore(state / "conversations").load(file.stem)
    return saved.nodes
