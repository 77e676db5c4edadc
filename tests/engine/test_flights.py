"""What enters the pipeline next: groups of decode steps, chunks, and turns between them."""

from __future__ import annotations

from collections import deque
from itertools import count

import pytest

from engine.decoding.accept import AcceptRule
from engine.decoding.tree import ROOT_ONLY
from engine.decoding.tuner import FixedTree
from engine.pipeline.batch import Judge, crowd_of, decode_batch, encode_batch
from engine.pipeline.flights import MIN_SHARED_ROWS, Composer, Flight
from engine.pipeline.sequence import Limits, Sequence
from engine.pipeline.slots import Slot
from engine.planning.chunks import prefill_chunks

LONGEST = 64


class Pipeline:
    """Flights that come back one after the other; every judged one brings a token."""

    def __init__(self, stages: int, *, shared: bool = False) -> None:
        self.composer = Composer(
            FixedTree(ROOT_ONLY), stages=stages, shared=shared, longest=LONGEST
        )
        self.running: list[Sequence] = []
        self.flights: deque[Flight] = deque()
        self.clock = count(1)

    def add(self, prompt: int) -> Sequence:
        at = len(self.running)
        sequence = Sequence(
            request_id=str(at),
            tokens=[1] * prompt,
            prompt_tokens=prompt,
            begun=prompt,
            cached_tokens=0,
            slot=Slot(at),
            prompt_text="",
            rule=AcceptRule(),
            limits=Limits(None, None, 10_000),
            stream=None,  # type: ignore[arg-type]
            arrived=0.0,
            stop_ids=frozenset(),
            fed=0,
            chunks=prefill_chunks(prompt, self.composer._stages, 5, LONGEST),
        )
        self.running.append(sequence)
        return sequence

    def send(self) -> list[Flight]:
        """All that may enter now."""
        sent = []
        while (flight := self.composer.next(self.running, self.flights)) is not None:
            self.flights.append(flight)
            sent.append(flight)
        return sent

    def land(self) -> Flight:
        flight = self.flights.popleft()
        for entry, sequence in zip(flight.entries, flight.sequences, strict=True):
            if entry.judge is not Judge.NONE:
                sequence.in_flight = False
                sequence.first_token_at = sequence.last_token_at = float(next(self.clock))
        return flight


def prefilled(stages: int, sequences: int, *, shared: bool = False) -> Pipeline:
    pipeline = Pipeline(stages, shared=shared)
    for _ in range(sequences):
        pipeline.add(4)
    while any(s.prefilling for s in pipeline.running):
        pipeline.send()
        pipeline.land()
    while pipeline.flights:
        pipeline.land()
    return pipeline


def sizes(flights: list[Flight]) -> list[int]:
    return [len(flight.sequences) for flight in flights]


@pytest.mark.parametrize(
    ("stages", "sequences", "expected"),
    [(1, 16, [16]), (2, 16, [8, 8]), (3, 16, [6, 6, 4]), (3, 2, [1, 1]), (2, 1, [1])],
)
def test_decode_steps_are_cut_into_as_many_groups_as_there_are_stages(
    stages: int, sequences: int, expected: list[int]
) -> None:
    assert sizes(prefilled(stages, sequences).send()) == expected


def test_stages_that_share_cores_get_one_step_until_it_is_large() -> None:
    few = prefilled(2, MIN_SHARED_ROWS, shared=True)
    many = prefilled(2, 2 * MIN_SHARED_ROWS, shared=True)
    assert sizes(few.send()) == [MIN_SHARED_ROWS]
    assert sizes(many.send()) == [MIN_SHARED_ROWS] * 2
    assert [flight.crowd for flight in (*few.flights, *many.flights)] == [1, 2, 2]


def test_every_sequence_gets_its_turn_and_uneven_groups_even_out() -> None:
    pipeline = prefilled(2, 5)
    first = pipeline.send()
    for _ in range(4):
        pipeline.add(4)
    turns = dict.fromkeys((s.request_id for s in pipeline.running), 0)
    assert sizes(first) == [3, 2]
    for _ in range(24):
        pipeline.send()
        for sequence in pipeline.land().sequences:
            turns[sequence.request_id] += 1
    assert max(turns.values()) - min(turns.values()) <= 3
    decoding = [len(flight.sequences) for flight in pipeline.flights if flight.tree is not None]
    assert sorted(decoding) == [4, 5] or decoding in ([4], [5])


def test_chunks_and_decode_steps_take_turns() -> None:
    pipeline = prefilled(2, 4)
    long = pipeline.add(10 * LONGEST)
    kinds = []
    for _ in range(12):
        kinds += [flight.tree is None for flight in pipeline.send()]
        pipeline.land()
    assert 4 <= sum(kinds) <= len(kinds) - 4
    assert all(not (a and b and c) for a, b, c in zip(kinds, kinds[1:], kinds[2:], strict=False))
    assert long.fed > 0


def test_a_prompt_alone_fills_all_stages_with_its_chunks_in_order() -> None:
    pipeline = Pipeline(3)
    pipeline.add(4 * LONGEST)
    sent = pipeline.send()
    assert [flight.entries[0].start for flight in sent] == [0, 52, 104, 156]
    assert [flight.crowd for flight in sent] == [2, 3, 3, 3]
    assert pipeline.composer.next(pipeline.running, pipeline.flights) is None


def test_short_prompts_share_a_micro_batch() -> None:
    pipeline = Pipeline(1)
    for _ in range(20):
        pipeline.add(10)
    first = pipeline.send()[0]
    assert [len(entry.tokens) for entry in first.entries] == [10] * 6 + [4]
    pipeline.land()
    (second,) = pipeline.send()
    assert second.tree is not None  # those that are ready come in between
    pipeline.land()
    assert pipeline.send()[0].entries[0].start == 4


def test_the_crowd_travels_with_the_entries() -> None:
    entries = prefilled(2, 3).send()[0].entries
    numbers = encode_batch(entries, 2)
    assert crowd_of(numbers) == 2
    assert decode_batch(numbers) == entries
