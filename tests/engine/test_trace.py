"""What a request that asks for it is told about how its tokens came."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.decoding.tree import depths_of
from engine.pipeline.batch import Entry, Judge, Result
from engine.pipeline.tracing import step_trace
from engine.protocol import (
    PROTOCOL_VERSION,
    Event,
    EventEnvelope,
    Finished,
    Generate,
    SamplingParams,
    StepTrace,
    Tokens,
    decode_event,
    encode,
)
from engine.text import TextCodec
from tests.engine.test_scheduler import ECHO_HEADS, NO_HEADS, PROMPTS, Engine, text_of
from tests.tiny import tiny_folder

GREEDY = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(params=[NO_HEADS, ECHO_HEADS], ids=["none", "echo"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine(request.param)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    folder = tiny_folder()
    return TextCodec(folder, folder / "tokenizer.json", [259])


def traced(engine: Engine, text: str, params: SamplingParams = GREEDY) -> list[Event]:
    request = Generate(request_id="a", prompt=text, params=params, trace=True)
    return engine.ask(request)["a"]


def steps_of(events: list[Event]) -> list[StepTrace]:
    return [step for event in events if isinstance(event, Tokens) for step in event.trace]


def test_every_token_is_traced_and_the_pieces_are_the_text(engine: Engine) -> None:
    events = traced(engine, PROMPTS[3])
    tokens = [event for event in events if isinstance(event, Tokens)]
    for event in tokens:
        assert sum(len(step.pieces) for step in event.trace) == len(event.token_ids)
        assert "".join(piece for step in event.trace for piece in step.pieces) == event.text
    assert "".join(p for step in steps_of(events) for p in step.pieces) == text_of(events)


def test_the_first_step_has_no_tree_and_each_later_tree_grows_from_the_token_before(
    engine: Engine,
) -> None:
    first, *decode = steps_of(traced(engine, PROMPTS[3]))
    assert (first.parents, first.path, len(first.pieces)) == ((), (), 1)
    before = first.next_text
    for step in decode:
        assert step.texts[0] == before
        assert len(step.texts) == len(step.parents) == engine.scheduler.drafting.tree.size
        assert [step.parents[node] for node in step.path] == [-1, *step.path[:-1]]
        before = step.next_text


def test_counts_of_the_traces_are_those_of_the_finished_request(engine: Engine) -> None:
    events = traced(engine, PROMPTS[3])
    done = events[-1]
    assert isinstance(done, Finished)
    decode = steps_of(events)[1:]
    assert len(decode) == done.metrics.decode_steps
    for head, (proposed, accepted) in enumerate(
        zip(done.metrics.proposed_per_head, done.metrics.accepted_per_head, strict=True), start=1
    ):
        assert proposed == sum(max(depths_of(step.parents)) >= head for step in decode)
        assert accepted == sum(len(step.path) > head for step in decode)


def test_an_answer_that_ends_inside_a_step_has_pieces_only_for_what_was_taken() -> None:
    engine = Engine(ECHO_HEADS)
    cut = 0
    for limit in range(2, 14):
        params = SamplingParams(temperature=0, max_tokens=limit)
        last = steps_of(traced(engine, PROMPTS[3], params))[-1]
        cut += len(last.pieces) < len(last.path)
    engine.stop()
    assert cut


def test_a_request_that_does_not_ask_gets_no_trace_and_pays_nothing(engine: Engine) -> None:
    events = engine.ask(Generate(request_id="a", prompt=PROMPTS[3], params=GREEDY))["a"]
    assert steps_of(events) == []
    tokens = next(event for event in events if isinstance(event, Tokens))
    assert b"trace" not in encode(EventEnvelope(PROTOCOL_VERSION, 1, 0, tokens))


def test_a_token_by_itself_keeps_its_space_and_shows_half_a_character_as_such(
    tmp_path: Path,
) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: index for index, text in enumerate([*letters, "Ġa"])}
    byte_level = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a")]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    words = {"▁a": 0, "▁word": 1, "s": 2, "?": 3}
    sentencepiece = Tokenizer(models.WordLevel(words, unk_token="?"))
    sentencepiece.pre_tokenizer = pre_tokenizers.Metaspace()
    sentencepiece.decoder = decoders.Metaspace()

    def codec_of(tokenizer: Tokenizer) -> TextCodec:
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        return TextCodec(tmp_path, tmp_path / "tokenizer.json", [])

    codec = codec_of(byte_level)
    space_a, first, second = codec.encode(" aé", add_special_tokens=False)
    texts = [codec.token_text(token) for token in (space_a, first, second)]
    assert texts == [" a", "\ufffd", "\ufffd"]
    codec = codec_of(sentencepiece)
    assert [codec.token_text(token) for token in (1, 2)] == [" word", "s"]


def test_a_trace_crosses_the_queue_as_it_is(codec: TextCodec) -> None:
    nodes = codec.encode("ab\n", add_special_tokens=False)
    entry = Entry(slot=0, start=9, tokens=nodes, parents=[-1, 0, 0], judge=Judge.TREE)
    step = step_trace(codec, entry, Result(path=[0, 2], next_token=259, candidates=[]), ["\n", ""])
    assert step.texts == ("a", "b", "\n")
    assert step.next_text == "<|im_end|>"
    event = Tokens(request_id="r1", token_ids=(nodes[2], 259), text="\n", trace=(step,))
    back = decode_event(encode(EventEnvelope(PROTOCOL_VERSION, 1, 0, event)))
    assert back is not None
    assert back.body == event
