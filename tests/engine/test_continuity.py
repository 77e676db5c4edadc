"""Answers and conversations that go on where another engine left them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from engine.pipeline.slots import SlotTable
from engine.protocol import (
    Cancel,
    Event,
    Failed,
    Generate,
    Message,
    SamplingParams,
    Started,
    Transcript,
)
from engine.text import TextCodec
from tests.engine.test_scheduler import (
    CONTEXT,
    ECHO_HEADS,
    GREEDY,
    NO_HEADS,
    Engine,
    prompt,
    text_of,
    tokens_of,
)

QUESTION = (Message("user", "word word number 4?"),)


@pytest.fixture(scope="module", params=[NO_HEADS, ECHO_HEADS], ids=["none", "echo"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine(request.param)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def other() -> Iterator[Engine]:
    engine = Engine(NO_HEADS, max_sub_sequence_len=16, max_num_seqs=1)
    yield engine
    engine.stop()


def question(
    params: SamplingParams = GREEDY, *, answered: tuple[int, ...] = (), name: str = "a"
) -> Generate:
    return Generate(
        request_id=name,
        messages=QUESTION,
        params=params,
        answered=answered,
        transcript_wanted=True,
    )


def ask(engine: Engine, request: Generate) -> list[Event]:
    return engine.ask(request)[request.request_id]


NUCLEUS = SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_tokens=24)
# The config's own rule. What it accepts depends on the tree, so it is compared without heads.
TYPICAL = SamplingParams(temperature=0.7, seed=6, max_tokens=24)


def goes_on(whole: list[Event], engine: Engine, params: SamplingParams) -> None:
    """Whether `engine` goes on with `whole` after any of its tokens."""
    for cut in (1, 7, len(tokens_of(whole)) - 1):
        answered = tuple(tokens_of(whole)[:cut])
        rest = ask(engine, question(params, answered=answered))
        assert [*answered, *tokens_of(rest)] == tokens_of(whole)
        assert text_of(whole).endswith(text_of(rest))
        started, done = rest[0], rest[-1]
        assert isinstance(started, Started)
        assert started.prompt_tokens == whole[0].prompt_tokens
        assert done.prompt_tokens == whole[-1].prompt_tokens
        assert done.completion_tokens == whole[-1].completion_tokens
        assert done.finish_reason == whole[-1].finish_reason
        assert done.transcript == whole[-1].transcript


@pytest.mark.parametrize("params", [GREEDY, NUCLEUS], ids=["greedy", "nucleus"])
def test_an_answer_goes_on_after_any_of_its_tokens(
    other: Engine, engine: Engine, params: SamplingParams
) -> None:
    goes_on(ask(engine, question(params)), other, params)


def test_an_answer_by_typical_acceptance_goes_on_too(other: Engine) -> None:
    goes_on(ask(other, question(TYPICAL)), other, TYPICAL)


def test_a_cancelled_answer_goes_on_from_what_was_shown(engine: Engine, other: Engine) -> None:
    whole = ask(other, question())
    engine.inbox.put(question(SamplingParams(temperature=0), name="cut"))
    seen: list[Event] = []
    while len(tokens_of(seen)) < 5:
        seen.append(engine.events.get(timeout=30))
    engine.inbox.put(Cancel("cut"))
    seen += engine.collect({"cut"})["cut"]
    shown = tokens_of(seen)
    rest = ask(other, question(answered=tuple(shown[:20])))
    assert [*shown[:20], *tokens_of(rest)] == tokens_of(whole)


def test_a_stop_string_may_begin_before_the_cut(other: Engine) -> None:
    whole = ask(other, question())
    text = text_of(whole)
    params = SamplingParams(temperature=0, max_tokens=24, stop=(text[9:13],))
    end = text.index(text[9:13])
    # One token is one character here: the cut is in the middle of the stop string.
    rest = ask(other, question(params, answered=tuple(tokens_of(whole)[: end + 2])))
    assert text_of(rest) == ""
    assert rest[-1].finish_reason == "stop"


def test_text_held_back_at_the_cut_is_shown_when_it_is_no_stop_string(other: Engine) -> None:
    whole = ask(other, question())
    text = text_of(whole)
    cut = 10
    params = SamplingParams(temperature=0, max_tokens=24, stop=(text[cut - 2 : cut] + "\x00",))
    rest = ask(other, question(params, answered=tuple(tokens_of(whole)[:cut])))
    assert text_of(rest) == text[cut - 2 :]


@pytest.mark.parametrize(
    ("cut", "params", "reason", "context_full"),
    [
        (24, GREEDY, "length", False),
        (10, SamplingParams(temperature=0, max_tokens=8), "length", False),
        (200, SamplingParams(temperature=0), "length", True),
    ],
)
def test_an_answer_that_is_complete_already_ends_at_once(
    other: Engine, cut: int, params: SamplingParams, reason: str, context_full: bool
) -> None:
    rows = other.stage.meter.rows
    events = ask(other, question(params, answered=(5,) * cut))
    assert not tokens_of(events)
    done = events[-1]
    assert (done.finish_reason, done.context_full) == (reason, context_full)
    assert done.completion_tokens == cut
    assert other.stage.meter.rows == rows
    assert len(tokens_of(ask(other, question()))) == 24


def test_the_limit_on_steps_counts_those_of_before() -> None:
    engine = Engine(NO_HEADS, max_steps=9)
    whole = ask(engine, question())
    answered = tuple(tokens_of(whole)[:4])
    request = Generate(
        request_id="b",
        messages=QUESTION,
        params=GREEDY,
        answered=answered,
        answered_steps=3,
    )
    rest = ask(engine, request)
    engine.stop()
    assert len(tokens_of(whole)) == 10
    assert [*answered, *tokens_of(rest)] == tokens_of(whole)


@pytest.mark.parametrize("token", [-1, 260, 2**40])
def test_an_answer_of_another_model_fails_alone(other: Engine, token: int) -> None:
    events = other.ask(question(answered=(token,), name="bad"), question(name="good"))
    assert isinstance(events["bad"][-1], Failed)
    assert str(token) in events["bad"][-1].message
    assert len(tokens_of(events["good"])) == 24


@pytest.mark.parametrize("ids", [(-1,), (2**40,), (1, 2, 3)])
def test_a_transcript_that_does_not_fit_is_left_aside(other: Engine, ids: tuple[int, ...]) -> None:
    plain = ask(other, question())
    text = plain[0].transcript.text
    request = Generate(
        request_id="a", messages=QUESTION, params=GREEDY, transcript=Transcript(text, ids)
    )
    assert tokens_of(ask(other, request)) == tokens_of(plain)


def test_transcripts_come_only_where_they_are_wanted(other: Engine) -> None:
    events = ask(other, prompt("a", "x"))
    assert (events[0].transcript, events[-1].transcript) == (None, None)
    events = ask(other, question())
    assert events[0].transcript.text.endswith("<|im_start|>assistant\n")
    assert len(events[0].transcript.token_ids) == events[0].prompt_tokens
    written = events[-1].transcript
    assert written.text == events[0].transcript.text + text_of(events)
    assert written.token_ids == (*events[0].transcript.token_ids, *tokens_of(events))


# --- which tokens a prompt begins with ---------------------------------------------------------


@pytest.fixture
def codec(tmp_path: Path) -> TextCodec:
    """A tokenizer that joins a and b; a model may as well write them one by one."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "c": 3}, merges=[("a", "b")]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return TextCodec(tmp_path, tmp_path / "tokenizer.json", [3])


APART = Transcript("ab", (0, 1))


def tokens(table: SlotTable, codec: TextCodec, text: str, transcript: Transcript | None) -> object:
    place = table.acquire(text, codec, chat=True, limit=CONTEXT, transcript=transcript)
    place.slot.busy = False
    return place.tokens


def test_a_transcript_keeps_tokens_as_the_model_wrote_them(codec: TextCodec) -> None:
    table = SlotTable(2)
    assert tokens(table, codec, "abab", None) == [2, 2]
    assert tokens(table, codec, "abab", APART) == [0, 1, 2]
    assert tokens(table, codec, "caba", APART) == [3, 2, 0]
    assert tokens(table, codec, "ab", APART) == [0, 1]


def test_a_slot_that_knows_more_of_the_prompt_comes_before_a_transcript(codec: TextCodec) -> None:
    table = SlotTable(2)
    slot = table.slots[1]
    slot.text, slot.tokens, slot.rows = "aba", [2, 0], 2
    assert tokens(table, codec, "abab", APART) == [2, 0, 1]
    slot.text, slot.tokens = "ab", [2]
    assert tokens(table, codec, "abab", APART) == [0, 1, 2]


def test_the_rows_of_an_answer_count_as_cached_where_they_are_there(codec: TextCodec) -> None:
    table = SlotTable(1)
    slot = table.slots[0]
    slot.tokens, slot.rows = [2, 3, 3, 0], 4
    place = table.acquire("ab", codec, chat=True, limit=CONTEXT, answered=(3, 3, 1))
    assert (place.tokens, place.cached) == ([2], 3)
