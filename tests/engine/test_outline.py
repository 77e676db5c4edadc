"""The outline of an answer, read as it is written, and outline answers over a tiny model."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable
from typing import Any

import pytest

from engine.config import parse_config
from engine.decoding.outline import (
    Next,
    Outline,
    Parts,
    Rest,
    Style,
    asked_for,
    find_list,
    parse_lines,
    settled,
    share_tokens,
)
from engine.pipeline.outlines import Outlines
from engine.pipeline.sequence import Fork
from engine.protocol import (
    Cancel,
    Failed,
    Finished,
    Generate,
    Message,
    Metrics,
    SamplingParams,
    Started,
    Tokens,
    Transcript,
)
from engine.text import TextCodec
from tests.tiny import tiny_folder

NUMBERED, DASHED = Style(numbered=True), Style(numbered=False)


def test_a_list_is_found_where_a_line_begins_with_its_first_marker() -> None:
    found = find_list("Here are tips:\n\n1. Sleep")
    assert found is not None
    assert (found.at, found.style) == (16, NUMBERED)
    assert find_list("- one") is not None
    assert find_list("* one").style == DASHED  # type: ignore[union-attr]
    for text in ("It took 1. place", "1.5 litres", "**Bold** start", "2. second", "1."):
        assert find_list(text) is None, text
    assert find_list("```\n1. in code") is None
    assert find_list("```\ncode\n```\n1. behind it") is not None


@pytest.mark.parametrize(
    "text", ["Tips:\n\n1. Sleep well", "a - b\n - c", "no list", "1) x", "\n*"]
)
def test_what_is_settled_never_reaches_into_a_marker(text: str) -> None:
    found = find_list(text)
    for length in range(len(text) + 1):
        begun = text[:length]
        if find_list(begun) is None:
            assert settled(begun) <= (found.at if found else length)
    assert found is not None or settled(text + " on") == len(text) + 3


@pytest.mark.parametrize(
    ("question", "count"),
    [
        ("List five ways to save money.", 5),
        ("Give me 7 tips", 7),
        ("What are the ten best books?", 10),
        ("Give me ideas for a ten year old.", None),
        ("Tell me about the two-year-old.", None),
        ("How do I sleep?", None),
    ],
)
def test_the_asked_number_of_points_is_heard(question: str, count: int | None) -> None:
    assert asked_for(question) == count


def test_lines_are_read_as_far_as_they_are_whole() -> None:
    text = "1. **Sleep Well**\n2. **Eat: Well**\n"
    assert parse_lines(text[:9], NUMBERED) == ([], Rest.OPEN)
    assert parse_lines(text[:17], NUMBERED) == (["Sleep Well"], Rest.OPEN)
    assert parse_lines(text[:20], NUMBERED) == (["Sleep Well"], Rest.OPEN)
    assert parse_lines(text, NUMBERED) == (["Sleep Well", "Eat"], Rest.CUT)
    assert parse_lines("1. **A**\n\nSo", NUMBERED) == (["A"], Rest.OVER)
    assert parse_lines("1. **A** is", NUMBERED) == (["A"], Rest.CUT)
    assert parse_lines("- **A**\n- **B**\n", DASHED) == (["A", "B"], Rest.OPEN)
    long = "1. **one two three four five six seven and nine ten"
    assert parse_lines(long, NUMBERED) == (["one two three four five six seven"], Rest.CUT)


def write(outline: Outline, answers: list[str]) -> list[str]:
    """Play a model that continues the prompts with `answers`; the prompts."""
    prompts = []
    for answer in answers:
        prompts.append(outline.prompt)
        after = Next.WAIT
        for end in range(1, len(answer) + 1):
            after = outline.read(answer[:end])
            if after is not Next.WAIT:
                break
        if after is Next.WAIT:
            after = outline.read(answer, ended=True)
        if after is Next.DONE:
            break
    return prompts


def test_an_outline_in_one_go_needs_one_prompt() -> None:
    outline = Outline(NUMBERED)
    prompts = write(outline, ["Sleep**\n2. **Eat**\n3. **Walk**\n\nThese three", "never asked"])
    assert prompts == ["1. **"]
    assert outline.titles == ["Sleep", "Eat", "Walk"]


def test_a_line_that_goes_on_is_cut_and_a_list_that_is_too_short_goes_on() -> None:
    outline = Outline(NUMBERED)
    prompts = write(outline, ["Sleep**: It is good", "So", "Eat: more", "3. **Walk**\nEnd"])
    lines = "1. **Sleep**\n"
    more = f"{lines}2. **Eat**\n"
    assert prompts == ["1. **", lines, f"{lines}2. **", more]
    assert outline.titles == ["Sleep", "Eat", "Walk"]
    assert outline.header(2) == "2. **Eat**:"


def test_a_point_that_is_there_already_is_drawn_once_then_ends_the_outline() -> None:
    outline = Outline(NUMBERED, most=5, least=5)
    prompts = write(outline, ["A**\n2. **a**", "B**\n3. **B**", "B**", "never asked"])
    assert prompts == ["1. **", "1. **A**\n2. **", "1. **A**\n2. **B**\n3. **"]
    assert outline.titles == ["A", "B"]


def test_an_outline_ends_whatever_is_written() -> None:
    draw = random.Random(5)
    pieces = ["**", "\n", "1. **", "2. **", "3. **", "- **", "word ", ":", " - ", "", "x"]
    for _ in range(300):
        outline = Outline(draw.choice([NUMBERED, DASHED]), most=draw.randint(1, 10))
        answers = ["".join(draw.choices(pieces, k=draw.randint(0, 9))) for _ in range(60)]
        prompts = write(outline, answers)
        assert len(prompts) < 45
        assert len(outline.titles) <= outline.most
        assert len(set(map(str.casefold, outline.titles))) == len(outline.titles)


def test_shares_fit_the_limit_and_parts_join_in_their_order() -> None:
    assert share_tokens(100, 3, 160) == 33
    assert share_tokens(1000, 3, 160) == 160
    assert share_tokens(1, 3, 160) == 1
    parts = Parts()
    for point, text in ((0, "Tips:\n\n"), (2, "\n\n2. **B**:"), (1, "1. **A**:"), (2, " b")):
        parts.add(point, text)
    assert parts.text == "Tips:\n\n1. **A**:\n\n2. **B**: b"


# --- the parts of one answer, written by a player in the engine's place ---

CONFIG = parse_config({"base_model_name_or_path": "x", "stage_num_hidden_layers_list": [1]}, "test")


class Play:
    """Answers each part with what `script` makes of its prompt, some characters at a time."""

    def __init__(self, script: Callable[[str], str], **request: Any) -> None:
        folder = tiny_folder("llama")
        self.codec = TextCodec(folder, folder / "tokenizer.json", ())
        self.script = script
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.events: list[Any] = []
        self.asked: list[Fork] = []
        self.outlines = Outlines(self.codec, CONFIG, self.inbox.put, self.events.append)
        params = SamplingParams(mode="outline", **request)
        question = (Message("user", "Give me three tips"),)
        self.request = Generate(
            request_id="a", messages=question, params=params, transcript_wanted=True
        )
        assert self.outlines.takes(self.request)

    def run(self, steps: int = 10_000) -> None:
        """Let all parts that are asked for grow in turns, for so many steps."""
        open_parts: dict[str, list[str]] = {}
        while steps and (open_parts or not self.inbox.empty()):
            steps -= 1
            while not self.inbox.empty():
                self._command(self.inbox.get(), open_parts)
            for name in list(open_parts):
                if text := open_parts[name].pop(0) if open_parts[name] else "":
                    ids = self.codec.encode(text, add_special_tokens=False)
                    self.outlines.emit(Tokens(request_id=name, token_ids=tuple(ids), text=text))
                else:
                    del open_parts[name]
                    self._finish(name, "stop")

    def _command(self, command: Fork | Cancel, open_parts: dict[str, list[str]]) -> None:
        if isinstance(command, Cancel):
            if open_parts.pop(command.request_id, None) is not None:
                self._finish(command.request_id, "cancelled")
            return
        self.asked.append(command)
        prompt = command.prompt or self.codec.render(command.messages or ())
        tokens = self.codec.encode(prompt, add_special_tokens=False)
        if command.transcript is not None:
            assert command.transcript == Transcript(prompt, tuple(tokens))
        text = self.script(prompt)
        for stop in command.params.stop:
            text = text.partition(stop)[0]
        open_parts[command.request_id] = [text[i : i + 3] for i in range(0, len(text), 3)]
        known = Transcript(prompt, tuple(tokens))
        self.outlines.emit(
            Started(
                request_id=command.request_id,
                prompt_tokens=len(tokens),
                cached_tokens=0,
                transcript=known,
            )
        )

    def _finish(self, name: str, reason: Any) -> None:
        self.outlines.emit(
            Finished(
                request_id=name,
                finish_reason=reason,
                context_full=False,
                prompt_tokens=1,
                cached_tokens=0,
                completion_tokens=1,
                metrics=Metrics(decode_steps=2),
            )
        )

    @property
    def parts(self) -> Parts:
        parts = Parts()
        for event in self.events:
            if isinstance(event, Tokens):
                parts.add(event.point, event.text)
        return parts


def tips(prompt: str) -> str:
    answer = prompt.rpartition("assistant\n")[2]
    if answer == "":
        return "Some tips:\n\n1. Sleep well and"
    if answer.endswith("1. **"):
        return "Sleep**\n2. **Eat**\n3. **Walk**\n4. **Too many"
    return " do " + answer.rpartition("**")[0].rpartition("**")[2] + ".\n\nMore"


def test_a_list_becomes_an_outline_whose_points_grow_side_by_side() -> None:
    play = Play(tips)
    play.run()
    text = "Some tips:\n\n1. **Sleep**: do Sleep.\n\n2. **Eat**: do Eat.\n\n3. **Walk**: do Walk."
    assert play.parts.text == text
    started, *tokens, finished = play.events
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert {event.request_id for event in play.events} == {"a"}
    assert finished.finish_reason == "stop"
    assert finished.metrics.ttft_s  # that of the answer, as no part has one here
    assert finished.completion_tokens == sum(len(event.token_ids) for event in tokens)
    assert finished.transcript == Transcript(
        started.transcript.text + text,
        tuple(play.codec.encode(started.transcript.text + text, add_special_tokens=False)),
    )
    points = [event.point for event in tokens]
    assert points[points.index(1) :] != sorted(points[points.index(1) :])
    assert [fork.point for fork in play.asked] == [0, 0, 1, 2, 3]


def test_an_answer_that_is_no_list_is_given_as_it_comes() -> None:
    play = Play(lambda prompt: "Paris - 1. of all.\n\n-")
    play.run()
    assert play.parts.texts == {0: "Paris - 1. of all.\n\n-"}
    assert len(play.asked) == 1


def test_a_list_of_one_point_goes_on_plainly() -> None:
    def script(prompt: str) -> str:
        answer = prompt.rpartition("assistant\n")[2]
        opening = "Well:\n"
        return {"": opening + "- one", opening: "- one thing"}.get(answer, "Same**\n")

    play = Play(script)
    play.run()
    assert play.parts.text == "Well:\n- one thing"
    assert set(play.parts.texts) == {0}


def test_a_small_limit_leaves_the_answer_plain_and_a_larger_one_is_shared() -> None:
    play = Play(tips, max_tokens=60)
    play.run()
    assert len(play.asked) == 1
    play = Play(tips, max_tokens=130)
    play.run()
    share = play.asked[-1].params.max_tokens
    assert share is not None
    headers = sum(len(f"\n\n{n}. **{t}**:") for n, t in enumerate(("Sleep", "Eat", "Walk"), 1)) - 2
    assert 12 + headers + 3 * share <= 130
    assert share > 10


@pytest.mark.parametrize("steps", [1, 3, 10, 15, 22, 30])
def test_cancelling_ends_all_parts_and_keeps_what_there_is(steps: int) -> None:
    play = Play(tips)
    play.run(steps)
    if play.events and isinstance(play.events[-1], Finished):
        return
    before = play.parts.text
    assert play.outlines.takes(Cancel("a"))
    # The parts that were under way in `run` are the engine's to end.
    for name in list(play.outlines._parts):
        play._finish(name, "cancelled")
    finished = play.events[-1]
    assert isinstance(finished, Finished)
    assert finished.finish_reason == "cancelled"
    assert play.parts.text.startswith(before)
    assert finished.transcript is not None
    assert finished.transcript.text.endswith(play.parts.text)
    assert not play.outlines._answers


def test_a_refused_prompt_is_told_as_the_clients() -> None:
    play = Play(tips)
    fork = play.inbox.get()
    play.outlines.emit(
        Failed(request_id=fork.request_id, message="too long", code="prompt_too_long")
    )
    assert play.events == [Failed(request_id="a", message="too long", code="prompt_too_long")]
