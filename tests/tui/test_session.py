"""The engine under the screens: asking it, changing it, and answers that outlive it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from engine.client import Update
from engine.config import JupiterConfig
from engine.errors import ConfigError, EngineError, JupiterError
from engine.protocol import (
    Failed,
    Finished,
    Message,
    Metrics,
    SamplingParams,
    StageState,
    Started,
    Tokens,
    Transcript,
)
from engine.request import RequestStream
from engine.updates import ClientState, StateChanged
from tests.tui.fake_client import CONFIG, READY, FakeClient
from tui.messages import EngineChanged
from tui.session import EngineSession

THREE = replace(CONFIG, stage_num_hidden_layers_list=[10, 10, 10])
QUESTION = [Message("user", "hello")]
PROMPT = Transcript("<user>hello<assistant>", (7, 8, 9))
PATIENCE_S = 10.0


class Bench:
    """A session whose engines the test plays, and all that it posted."""

    def __init__(self) -> None:
        self.clients: list[FakeClient] = []
        self.posted: list[Any] = []
        self.session = EngineSession(CONFIG, self.posted.append, self._make)
        self.refuse: JupiterError | None = None

    def _make(self, config: JupiterConfig, listener: Callable[[Update], None]) -> FakeClient:
        self.clients.append(FakeClient(config, listener))
        return self.clients[-1]

    @property
    def client(self) -> FakeClient:
        return self.clients[-1]

    @property
    def phases(self) -> list[str]:
        snapshots = [m.snapshot for m in self.posted if isinstance(m, EngineChanged)]
        return [snapshot.phase for snapshot in snapshots]

    async def check(self, config: JupiterConfig, on_message: Callable[[str], None]) -> Path:
        if self.refuse is not None:
            raise self.refuse
        return Path()

    async def until(self, test: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not test():
                await asyncio.sleep(0)

    async def ready(self) -> None:
        """The first engine gets ready."""
        starting = asyncio.create_task(self.session.start())
        await self.until(lambda: self.clients)
        self.client.get_ready()
        await starting

    async def engine(self, number: int) -> None:
        """The engine with this number, counted from 1, has been made and is to start."""
        await self.until(lambda: len(self.clients) == number)

    async def healthy(self) -> None:
        """The engine that starts gets ready and makes its token."""
        config = self.client.config
        self.client.get_ready(replace(READY, stages=tuple(config.stage_num_hidden_layers_list)))
        await self.until(lambda: self.client.trials)
        trial = self.client.trials[-1]
        trial.put(Started(request_id="r1", prompt_tokens=1, cached_tokens=0))
        trial.put(Tokens(request_id="r1", token_ids=(3,), text="a"))
        trial.put(finished("r1", "length", 1))


def finished(request_id: str, reason: Any, count: int, metrics: Metrics | None = None) -> Finished:
    return Finished(
        request_id=request_id,
        finish_reason=reason,
        context_full=False,
        prompt_tokens=3,
        cached_tokens=1,
        completion_tokens=count,
        metrics=metrics or Metrics(),
    )


class Reader:
    """One answer as the screen reads it."""

    def __init__(self, stream: RequestStream) -> None:
        self.stream = stream
        self.events: list[Any] = []
        self.error: EngineError | None = None
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for event in self.stream:
                self.events.append(event)
        except EngineError as error:
            self.error = error

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Tokens))


def begin(bench: Bench, text: str = "one ", token: int = 1) -> None:
    """The engine begins the latest answer."""
    stream = bench.client.request
    name = stream.request_id
    stream.put(Started(request_id=name, prompt_tokens=3, cached_tokens=1, transcript=PROMPT))
    say(bench, text, token)


def say(bench: Bench, text: str, *tokens: int) -> None:
    stream = bench.client.request
    stream.put(Tokens(request_id=stream.request_id, token_ids=tokens, text=text))


def end(bench: Bench, reason: str, count: int, metrics: Metrics | None = None) -> None:
    stream = bench.client.request
    stream.put(finished(stream.request_id, reason, count, metrics))


@asynccontextmanager
async def opened(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    bench = Bench()
    monkeypatch.setattr("engine.prepare.prepare_model", bench.check)
    await bench.ready()
    yield bench
    await bench.session.stop()
    assert all(client.stops for client in bench.clients)
    async with asyncio.timeout(PATIENCE_S):
        while asyncio.all_tasks() != {asyncio.current_task()}:
            await asyncio.sleep(0)


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    async with opened(monkeypatch) as bench:
        yield bench


async def drained(bench: Bench, config: JupiterConfig = THREE) -> asyncio.Task[None]:
    """A change has begun and has asked the engine to stop the running answer."""
    applying = asyncio.create_task(bench.session.apply(config))
    await bench.until(lambda: bench.client.cancelled)
    return applying


async def test_an_answer_goes_on_where_it_was_on_the_new_engine(bench: Bench) -> None:
    reader = Reader(bench.session.ask(QUESTION, params=SamplingParams(max_tokens=9)))
    begin(bench)
    applying = await drained(bench)
    say(bench, "two ", 2, 3)  # the step that was under way
    parts = Metrics(ttft_s=0.5, decode_steps=2, mean_accepted_len=1.5, tokens_per_s=10.0)
    end(bench, "cancelled", 3, parts)
    await bench.engine(2)
    assert bench.session.snapshot.phase == "applying"
    await bench.healthy()
    await applying
    resumed = bench.client.requests[-1]
    assert resumed.request_id == reader.stream.request_id
    assert (resumed.answered, resumed.answered_steps) == ((1, 2, 3), 2)
    assert resumed.transcript == PROMPT
    assert resumed.params.max_tokens == 9
    assert resumed.params.seed == bench.clients[0].requests[0].params.seed is not None

    bench.client.started(prompt_tokens=99)
    say(bench, "four", 4)
    end(bench, "stop", 4, Metrics(ttft_s=9, decode_steps=2, mean_accepted_len=1, tokens_per_s=4))
    await reader.task
    assert [type(event) for event in reader.events] == [Started, Tokens, Tokens, Tokens, Finished]
    assert reader.text == "one two four"
    done = reader.events[-1]
    assert (done.finish_reason, done.completion_tokens, done.prompt_tokens) == ("stop", 4, 3)
    # 3 tokens in 0.3 s, then 2 in 0.5 s.
    assert done.metrics.tokens_per_s == pytest.approx(5 / 0.8)
    assert done.metrics.mean_accepted_len == pytest.approx(5 / 4)
    assert (done.metrics.ttft_s, done.metrics.decode_steps) == (0.5, 4)
    assert bench.session.config == THREE
    assert bench.session.snapshot.split == (10, 10, 10)
    assert bench.phases[-1] == "ready" and "failed" not in bench.phases


async def test_an_engine_that_waits_for_a_machine_can_be_replaced_by_a_smaller_one(
    bench: Bench,
) -> None:
    reader = Reader(bench.session.ask(QUESTION, params=SamplingParams(max_tokens=9)))
    begin(bench)
    bench.client.tell(StateChanged(ClientState.RECOVERING, "waiting for node 1 (b)"))
    assert bench.session.snapshot.phase == "recovering"
    one = replace(CONFIG, stage_num_hidden_layers_list=[30])
    applying = await drained(bench, one)
    end(bench, "cancelled", 1)  # as a client without an engine does at once
    await bench.engine(2)
    await bench.healthy()
    await applying
    assert bench.client.requests[-1].answered == (1,)
    bench.client.started(prompt_tokens=3)
    end(bench, "stop", 1)
    await reader.task
    assert bench.session.snapshot.phase == "ready"


async def test_another_split_of_as_many_stages_moves_layers_under_a_running_answer(
    bench: Bench,
) -> None:
    bench.session.ask(QUESTION)
    moved = replace(CONFIG, stage_num_hidden_layers_list=[12, 18])
    await bench.session.apply(moved)
    assert bench.client.moved == moved and bench.session.config == moved
    assert bench.session.snapshot.split == (12, 18)
    assert bench.session.snapshot.phase == "ready"
    # Nothing was stopped for it.
    assert len(bench.clients) == 1 and not bench.client.cancelled and not bench.client.stops


async def test_a_config_that_does_not_fit_leaves_the_engine_as_it_is(bench: Bench) -> None:
    reader = Reader(bench.session.ask(QUESTION))
    begin(bench)
    bench.refuse = ConfigError("stage_num_hidden_layers_list: 30 layers, not 31")
    with pytest.raises(ConfigError, match="30 layers"):
        await bench.session.apply(THREE)
    assert bench.session.snapshot.phase == "ready"
    assert (len(bench.clients), bench.client.stops, bench.client.cancelled) == (1, 0, [])
    say(bench, "two", 2)
    end(bench, "stop", 2)
    await reader.task
    assert reader.text == "one two"


@pytest.mark.parametrize("how", ["start", "health", "no token"])
async def test_an_engine_that_does_not_come_up_is_rolled_back(bench: Bench, how: str) -> None:
    reader = Reader(bench.session.ask(QUESTION))
    begin(bench)
    applying = await drained(bench)
    end(bench, "cancelled", 1)
    await bench.engine(2)
    if how == "start":
        bench.client.fail_start(EngineError("stage 2: out of memory\nlog line"))
    else:
        bench.client.get_ready()
        await bench.until(lambda: bench.client.trials)
        trial = bench.client.trials[0]
        if how == "health":
            trial.put(Failed(request_id="r1", message="out of memory", code="internal_error"))
        else:
            trial.put(finished("r1", "stop", 0))
    await bench.engine(3)
    await bench.healthy()
    with pytest.raises(EngineError) as caught:
        await applying
    line = str(caught.value)
    assert "\n" not in line and "[10, 10, 10]" in line
    assert line.endswith("the engine is back on [15, 15]")
    assert "out of memory" in line or how == "no token"
    assert bench.clients[1].stops == 1
    assert bench.client.config == bench.session.config == CONFIG
    assert bench.session.snapshot.phase == "ready"
    assert bench.client.requests[-1].answered == (1,)
    say(bench, "two", 2)
    end(bench, "stop", 2)
    await reader.task
    assert reader.text == "one two"


async def test_when_neither_engine_comes_up_answers_end_and_the_engine_has_failed(
    bench: Bench,
) -> None:
    reader = Reader(bench.session.ask(QUESTION))
    begin(bench)
    applying = await drained(bench)
    end(bench, "cancelled", 1)
    for number in (2, 3):
        await bench.engine(number)
        bench.client.fail_start(EngineError(f"reason {number}"))
    with pytest.raises(EngineError, match=r"reason 2.*reason 3"):
        await applying
    await reader.task
    assert "reason 3" in str(reader.error)
    assert bench.session.snapshot.phase == "failed"
    with pytest.raises(EngineError):
        bench.session.ask(QUESTION)
    # The way out is a start anew, with the config that worked before.
    again = asyncio.create_task(bench.session.start())
    await bench.engine(4)
    bench.client.get_ready()
    await again
    assert bench.client.config == CONFIG
    assert bench.session.snapshot.phase == "ready"


async def test_what_is_asked_during_a_change_is_answered_after_it(bench: Bench) -> None:
    applying = asyncio.create_task(bench.session.apply(THREE))
    await bench.engine(2)
    reader = Reader(bench.session.ask(QUESTION, trace=True))
    left = Reader(bench.session.ask(QUESTION))
    bench.session.cancel(left.stream.request_id)
    await bench.healthy()
    await applying
    (request,) = bench.client.requests
    assert (request.answered, request.transcript, request.trace) == ((), None, True)
    begin(bench, "hi")
    end(bench, "stop", 1)
    await reader.task
    await left.task
    assert reader.text == "hi"
    assert [event.finish_reason for event in left.events] == ["cancelled"]


@pytest.mark.parametrize("when", ["before its last step", "when nobody works on it"])
async def test_an_answer_can_be_stopped_during_a_change(bench: Bench, when: str) -> None:
    reader = Reader(bench.session.ask(QUESTION))
    begin(bench)
    applying = await drained(bench)
    if when == "before its last step":
        bench.session.cancel(reader.stream.request_id)
    say(bench, "held back")  # what might have become a stop string
    end(bench, "cancelled", 1, Metrics(ttft_s=0.5))
    await bench.engine(2)
    if when == "when nobody works on it":
        bench.session.cancel(reader.stream.request_id)
    await reader.task
    assert reader.text == "one held back"
    done = reader.events[-1]
    assert (done.finish_reason, done.completion_tokens) == ("cancelled", 1)
    assert (done.prompt_tokens, done.metrics.ttft_s) == (3, 0.5)
    await bench.healthy()
    await applying
    assert not bench.client.requests


async def test_text_held_back_at_the_cut_is_left_to_the_new_engine(bench: Bench) -> None:
    reader = Reader(bench.session.ask(QUESTION))
    begin(bench)
    applying = await drained(bench)
    say(bench, "held back")
    end(bench, "cancelled", 1)
    await bench.engine(2)
    await bench.healthy()
    await applying
    say(bench, "held back and more", 2)
    end(bench, "stop", 2)
    await reader.task
    assert reader.text == "one held back and more"


async def test_another_model_goes_on_with_no_tokens_of_the_one_before(bench: Bench) -> None:
    reader = Reader(bench.session.ask(QUESTION))
    begin(bench)
    applying = await drained(bench, replace(CONFIG, base_model_name_or_path="other"))
    waits = Reader(bench.session.ask(QUESTION))
    end(bench, "cancelled", 1)
    await bench.engine(2)
    await reader.task
    assert reader.events[-1].finish_reason == "cancelled"
    await bench.healthy()
    await applying
    (request,) = bench.client.requests
    assert request.answered == ()
    end(bench, "stop", 0)
    await waits.task


async def test_an_answer_that_ends_in_its_last_step_is_left_as_it_is(bench: Bench) -> None:
    reader = Reader(bench.session.ask(QUESTION))
    begin(bench)
    applying = await drained(bench)
    end(bench, "stop", 1)
    await bench.engine(2)
    await bench.healthy()
    await applying
    await reader.task
    assert reader.events[-1].finish_reason == "stop"
    assert not bench.client.requests


async def test_a_second_change_is_refused_while_the_first_is_under_way(bench: Bench) -> None:
    applying = asyncio.create_task(bench.session.apply(THREE))
    await asyncio.sleep(0)  # it has only just begun
    with pytest.raises(EngineError, match="applying"):
        await bench.session.apply(CONFIG)
    await bench.engine(2)
    with pytest.raises(EngineError, match="applying"):
        await bench.session.apply(CONFIG)
    await bench.session.start()  # nor does a start get in between
    assert len(bench.clients) == 2
    await bench.healthy()
    await applying


async def test_a_caller_that_leaves_does_not_end_a_change_half_done(bench: Bench) -> None:
    applying = asyncio.create_task(bench.session.apply(THREE))
    await bench.engine(2)
    applying.cancel()
    await asyncio.wait([applying])
    await bench.healthy()
    await bench.until(lambda: bench.session.snapshot.phase == "ready")
    assert bench.session.config == THREE


async def test_quitting_during_a_change_stops_the_new_engine_and_ends_answers(
    bench: Bench,
) -> None:
    reader = Reader(bench.session.ask(QUESTION))
    begin(bench)
    applying = await drained(bench)
    end(bench, "cancelled", 1)
    await bench.engine(2)
    await bench.session.stop()
    with pytest.raises(EngineError):
        await applying
    await reader.task
    assert reader.error is not None
    assert len(bench.clients) == 2 and bench.client.stops
    assert bench.phases[-1] == "stopping"


async def test_an_engine_that_dies_during_the_change_is_replaced_all_the_same(
    bench: Bench,
) -> None:
    reader = Reader(bench.session.ask(QUESTION))
    begin(bench)
    applying = await drained(bench)
    bench.client.die("stage 1 was killed")
    await bench.engine(2)
    await bench.healthy()
    await applying
    assert bench.client.requests[-1].answered == (1,)
    end(bench, "stop", 1)
    await reader.task
    assert reader.error is None


async def test_a_change_brings_up_an_engine_after_a_death(bench: Bench) -> None:
    bench.client.die("stage 1 was killed")
    assert bench.session.snapshot.phase == "failed"
    applying = asyncio.create_task(bench.session.apply(THREE))
    await bench.engine(2)
    await bench.healthy()
    await applying
    assert (bench.session.snapshot.phase, bench.session.config) == ("ready", THREE)


async def test_what_never_came_up_is_not_gone_back_to(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    monkeypatch.setattr("engine.prepare.prepare_model", bench.check)
    starting = asyncio.create_task(bench.session.start())
    await bench.engine(1)
    bench.client.fail_start(EngineError("out of memory"))
    await starting
    applying = asyncio.create_task(bench.session.apply(THREE))
    await bench.engine(2)
    bench.client.fail_start(EngineError("no such device"))
    with pytest.raises(EngineError, match="no such device"):
        await applying
    assert len(bench.clients) == 2
    assert (bench.session.snapshot.phase, bench.session.config) == ("failed", CONFIG)


async def test_listeners_hear_every_update_but_the_health_check(bench: Bench) -> None:
    heard: list[Any] = []
    leave = bench.session.add_listener(heard.append)
    state = StageState(phase="loading", done=1, total=2)
    bench.client.stage(1, state)
    assert [update.body for update in heard] == [state]
    applying = asyncio.create_task(bench.session.apply(THREE))
    await bench.engine(2)
    bench.client.get_ready()
    await bench.until(lambda: bench.client.trials)
    heard.clear()
    bench.client.event(Tokens(request_id="r1", token_ids=(1,), text="a"))
    assert heard == []
    bench.client.trials[0].put(Tokens(request_id="r1", token_ids=(1,), text="a"))
    bench.client.trials[0].put(finished("r1", "length", 1))
    await applying
    bench.client.event(Tokens(request_id="answer-1", token_ids=(1,), text="a"))
    assert len(heard) == 1
    bench.clients[0].stage(0, state)  # the last words of the engine that was replaced
    assert len(heard) == 1
    leave()
    bench.client.stage(0, state)
    assert len(heard) == 1
