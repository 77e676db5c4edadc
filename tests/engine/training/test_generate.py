"""How a conversation is had: turn by turn, the model's own answers between the user's messages."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.config import parse_config
from engine.protocol import Failed, Finished, Message, Metrics, SamplingParams, Tokens
from engine.request import Answer, RequestStream
from engine.training.answer_file import AnswerFile
from engine.training.answering import AnswerRun, Prompt
from engine.training.args_medusa import GenerateArguments
from engine.training.generate import made_by, sampling_of
from engine.training.generate_progress import Progress

CONFIG = parse_config(
    {"base_model_name_or_path": "tiny", "stage_num_hidden_layers_list": [1], "top_p": 0.6}, "test"
)


class Scripted:
    """In the place of the engine's client: answers from a list of (text, finish reason)."""

    def __init__(self, *answers: tuple[str, str]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[Message, ...]] = []
        self.params: list[SamplingParams] = []

    def submit(self, *, messages: Sequence[Message], params: SamplingParams) -> RequestStream:
        self.asked.append(tuple(messages))
        self.params.append(params)
        text, reason = self.answers.pop(0)
        stream = RequestStream(f"r{len(self.asked)}")
        for event in self._events(stream.request_id, text, reason):
            stream.put(event)
        return stream

    def _events(self, request_id: str, text: str, reason: str) -> list[Answer]:
        if reason == "failed":
            return [Failed(request_id=request_id, message=text, code="prompt_too_long")]
        tokens = [Tokens(request_id=request_id, token_ids=(1,), text=letter) for letter in text]
        end = Finished(
            request_id=request_id, finish_reason=reason, context_full=False, prompt_tokens=1,
            cached_tokens=0, completion_tokens=len(text), metrics=Metrics(),
        )  # type: ignore[arg-type]  # fmt: skip
        return [*tokens, end]


class Talk:
    """One prompt asked of a scripted engine."""

    def __init__(self, path: Path, *answers: tuple[str, str], **args: Any) -> None:
        arguments = GenerateArguments(dataset=["p"], output=str(path), **args)
        self.engine = Scripted(*answers)
        prompt = Prompt("x", "be", ("one", "two"))
        with AnswerFile(path, made_by(arguments, CONFIG)) as file:
            run = AnswerRun(sampling_of(arguments, CONFIG), CONFIG, [prompt], file, Progress(1, 0))
            run._client = self.engine  # type: ignore[assignment]
            self.failure = asyncio.run(run.converse(prompt))
        text = path.read_text()
        self.row: dict[str, Any] = json.loads(text) if text else {}

    @property
    def said(self) -> list[str]:
        return [message["content"] for message in self.row["messages"]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_the_model_goes_on_from_its_own_answers(path: Path) -> None:
    talk = Talk(path, ("first", "stop"), ("second", "stop"))
    assert talk.failure is None
    assert talk.said == ["be", "one", "first", "two", "second"]
    assert talk.row["finish_reason"] == "stop"
    assert [m.content for m in talk.engine.asked[1]] == ["be", "one", "first", "two"]


def test_nobody_goes_on_from_half_an_answer(path: Path) -> None:
    talk = Talk(path, ("half a char\ufffd", "length"), ("never", "stop"))
    assert talk.said == ["be", "one", "half a char"]
    assert talk.row["finish_reason"] == "length"
    assert len(talk.engine.asked) == 1


def test_a_turn_that_has_no_room_ends_the_conversation_before_it(path: Path) -> None:
    talk = Talk(path, ("first", "stop"), ("too long", "failed"))
    assert talk.failure is None
    assert talk.said == ["be", "one", "first"]
    assert talk.row["finish_reason"] == "stop"


@pytest.mark.parametrize("answer", [("too long", "failed"), ("a", "cancelled")])
def test_a_prompt_without_any_answer_is_not_written(path: Path, answer: tuple[str, str]) -> None:
    talk = Talk(path, answer)
    assert talk.failure
    assert talk.row == {}


def test_sampling_is_from_the_models_distribution_with_a_seed_for_each_turn(path: Path) -> None:
    talk = Talk(path, ("a", "stop"), ("b", "stop"), temperature=0.5)
    first, second = talk.engine.params
    assert (first.temperature, first.top_p) == (0.5, 0.6)
    assert first.seed != second.seed
    assert talk.row["generated_by"] == {
        "model": "tiny", "max_new_tokens": 512, "temperature": 0.5, "top_p": 0.6, "seed": 42,
    }  # fmt: skip
    path.unlink()
    again = Talk(path, ("a", "stop"), ("b", "stop"), temperature=0.5).engine.params
    assert again == [first, second]
    path.unlink()
    other = Talk(path, ("a", "stop"), ("b", "stop"), temperature=0.5, seed=1).engine.params
    assert other[0].seed != first.seed
