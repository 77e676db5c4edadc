"""One request's events on their way to the screen."""

from __future__ import annotations

import asyncio

from textual.message import Message

from engine.errors import EngineError
from engine.protocol import Failed, Finished, Metrics, Started, Tokens
from engine.request import RequestStream
from tui.answer import follow
from tui.messages import AnswerFailed, AnswerFinished, AnswerGrew, AnswerLost, AnswerStarted

STARTED = Started(request_id="r1", prompt_tokens=5, cached_tokens=0)
FINISHED = Finished(
    request_id="r1",
    finish_reason="stop",
    context_full=False,
    prompt_tokens=5,
    cached_tokens=0,
    completion_tokens=4,
    metrics=Metrics(),
)


def tokens(text: str) -> Tokens:
    return Tokens(request_id="r1", token_ids=(1,), text=text)


class Reader:
    """Follows a stream that the test feeds, and keeps what is posted."""

    def __init__(self, interval: float) -> None:
        self.stream = RequestStream("r1")
        self.posted: list[Message] = []
        self._news = asyncio.Event()
        self.task = asyncio.create_task(follow("r1", self.stream, self._post, interval=interval))

    def _post(self, message: Message) -> None:
        self.posted.append(message)
        self._news.set()

    async def after(self, count: int) -> list[Message]:
        async with asyncio.timeout(5):
            while len(self.posted) < count:
                self._news.clear()
                await self._news.wait()
        return self.posted

    def texts(self) -> list[tuple[str, int]]:
        return [(m.text, len(m.token_ids)) for m in self.posted if isinstance(m, AnswerGrew)]


async def test_the_first_token_comes_at_once_and_the_next_ones_together() -> None:
    reader = Reader(interval=3600.0)
    reader.stream.put(STARTED)
    for text in ("One", " two", " three", " four"):
        reader.stream.put(tokens(text))
    await reader.after(2)
    assert reader.texts() == [("One", 1)]
    reader.stream.put(FINISHED)
    await reader.task
    assert reader.texts() == [("One", 1), (" two three four", 3)]
    assert isinstance(reader.posted[0], AnswerStarted)
    assert isinstance(reader.posted[-1], AnswerFinished)


async def test_joined_tokens_come_after_the_pause_without_a_further_event() -> None:
    reader = Reader(interval=0.01)
    for text in ("a", "b", "c"):
        reader.stream.put(tokens(text))
    await reader.after(2)
    assert reader.texts() == [("a", 1), ("bc", 2)]
    reader.stream.put(FINISHED)
    await reader.task


async def test_a_refusal_is_posted_as_one() -> None:
    reader = Reader(interval=0.01)
    reader.stream.put(Failed(request_id="r1", message="too long", code="prompt_too_long"))
    await reader.task
    (message,) = reader.posted
    assert isinstance(message, AnswerFailed) and message.failed.message == "too long"


async def test_what_came_before_the_engine_died_is_kept() -> None:
    reader = Reader(interval=3600.0)
    for text in ("kept", " too"):
        reader.stream.put(tokens(text))
    reader.stream.fail(EngineError("stage 1 was killed"))
    await reader.task
    assert reader.texts() == [("kept", 1), (" too", 1)]
    assert isinstance(reader.posted[-1], AnswerLost)
