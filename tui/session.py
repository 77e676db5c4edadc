"""The screen's one hold on the engine: start it, ask it, change it, stop it."""

from __future__ import annotations

import asyncio
import importlib
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

from msgspec.structs import replace
from textual.message import Message as UiMessage

from engine.config import JupiterConfig
from engine.continuity import AnswerStream
from engine.errors import EngineError, JupiterError
from engine.protocol import (
    EngineReady,
    EventEnvelope,
    Failed,
    Generate,
    Message,
    Notice,
    SamplingParams,
    Tokens,
    Transcript,
)
from engine.request import RequestStream
from engine.updates import ClientState, StateChanged
from tui.answers import Answers
from tui.messages import EngineChanged, EngineNotice
from tui.snapshot import Snapshot, fold

if TYPE_CHECKING:
    from engine.client import Update
    from engine.nodes.hub import Hub

# A stage may have a long chunk to finish before it stops; tokens of later are computed again.
DRAIN_S = 10.0
# One token of a large model on a slow machine.
HEALTH_S = 120.0
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0)


class Client(Protocol):
    """What the session needs of engine.client.EngineClient."""

    config: JupiterConfig

    async def start(self) -> EngineReady: ...
    def submit(self, *, prompt: str, params: SamplingParams) -> RequestStream: ...
    def send(self, request: Generate) -> RequestStream: ...
    def cancel(self, request_id: str) -> None: ...
    async def resplit(self, config: JupiterConfig) -> EngineReady: ...
    def log_path(self, rank: int) -> Path | None: ...
    async def stop(self) -> None: ...
    def kill_now(self) -> None: ...


ClientFactory = Callable[[JupiterConfig, "Callable[[Update], None]"], Client]


class EngineSession:
    """One engine at a time, over any number of launches; answers go on from one to the next.

    Every change is posted as EngineChanged with the snapshot of that moment.
    """

    def __init__(
        self,
        config: JupiterConfig,
        post: Callable[[UiMessage], object],
        make_client: ClientFactory | None = None,
        hub: Hub | None = None,
    ) -> None:
        self.config = config
        """Of the engine that runs, or that would be started anew."""
        self.snapshot = Snapshot.before_launch(config)
        self.error: JupiterError | None = None
        """Why the last launch failed, if it did not get ready."""
        self.client: Client | None = None
        self._post = post
        self._make_client = make_client
        self._hub = hub
        self._engines = 0
        self._listeners: list[Callable[[Update], None]] = []
        self._asked = 0
        self._answers = Answers()
        self._dead = ""
        """Why there is no engine any more, if it has ended."""
        self._health_check = ""
        self._transaction: asyncio.Task[None] | None = None

    # --- start and stop ------------------------------------------------------------------------

    async def start(self) -> None:
        """Launch the engine and wait until it is ready or has failed; posts, never raises."""
        if self._stopped() or self.snapshot.phase == "applying":
            return
        self.error = None
        self._change(self.snapshot.launching(time.monotonic()))
        try:
            await self._launch(self.config)
            assert self.client is not None
            self.config = self.client.config  # what was to be planned is
        except JupiterError as error:
            self.error = error
            if not self._stopped():
                self._change(self.snapshot.failed(str(error)))

    async def stop(self) -> None:
        """Stop the engine for good; no process is left afterwards. Idempotent."""
        self._change(self.snapshot.stopping())
        if self._transaction is not None and not self._transaction.done():
            self._transaction.cancel()
            await asyncio.wait([self._transaction])
        if self.client is not None:
            await self.client.stop()

    def kill_now(self) -> None:
        """Kill every process of the engine at once; from any thread, when the loop hangs."""
        if self.client is not None:
            self.client.kill_now()

    def _stopped(self) -> bool:
        return self.snapshot.phase == "stopping"

    async def _launch(self, config: JupiterConfig) -> None:
        """Put an engine of `config` in the place of the one there is; raises JupiterError."""
        if self._make_client is None:
            # In a thread: the client's imports take about 0.1 s, and the user may be typing.
            self._make_client = await asyncio.to_thread(_real_client, self._hub)
        if self.client is not None:
            await self.client.stop()
        if self._stopped():
            raise EngineError("the engine was stopped")
        self._engines += 1
        self._dead = ""
        self.client = self._make_client(config, partial(self._learn, self._engines))
        await self.client.start()

    # --- what it tells -------------------------------------------------------------------------

    def add_listener(self, callback: Callable[[Update], None]) -> Callable[[], None]:
        """Have every update of the engine as it comes; the result ends that."""
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback)

    def _learn(self, engine: int, update: Update) -> None:
        if engine != self._engines:
            return  # the last words of an engine that was already replaced
        body = update.body if isinstance(update, EventEnvelope) else None
        if self._health_check and getattr(body, "request_id", "") == self._health_check:
            return  # nobody has asked that
        if isinstance(update, StateChanged) and update.state is ClientState.DEAD:
            self._dead = update.reason or "the engine died"
        if isinstance(update, StateChanged) and update.state is ClientState.RECOVERING:
            self._post(EngineNotice(update.reason.partition("\n")[0]))
        for listener in tuple(self._listeners):
            listener(update)
        if isinstance(update, EventEnvelope) and isinstance(body, Notice):
            self._post(EngineNotice(f"stage {update.rank}: {body.message}"))
        else:
            self._change(fold(self.snapshot, update, time.monotonic()))

    def _change(self, snapshot: Snapshot) -> None:
        if snapshot is not self.snapshot:
            self.snapshot = snapshot
            self._post(EngineChanged(snapshot))

    # --- asking --------------------------------------------------------------------------------

    def ask(
        self,
        messages: Sequence[Message],
        *,
        params: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
        transcript: Transcript | None = None,
        answered: tuple[int, ...] = (),
        trace: bool = False,
    ) -> AnswerStream:
        """Send a conversation.

        Args:
            messages: the conversation, the user's message last.
            params: a request without a seed is given one here, so that it can be continued.
            transcript: of the turn before, as its `Finished` carried it: then its tokens stand as
                the model wrote them. Without effect where the messages do not go on from it.
            answered: tokens that the answer has already, to have it go on after them; with the
                transcript that its `Started` carried. They count for `max_tokens`.
            trace: have `Tokens` tell how each token came.

        Returns:
            Its events: Started, Tokens..., at last Finished or Failed, with transcripts. It goes
            on over a change of the engine. While the engine is being changed it waits.

        Raises:
            EngineError: the engine is not ready.
        """
        if self.client is None:
            raise EngineError("the engine is not started yet")
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(62))
        self._asked += 1
        request = Generate(
            request_id=f"answer-{self._asked}",
            messages=tuple(messages),
            params=params,
            transcript=transcript,
            transcript_wanted=True,
            answered=answered,
            trace=trace,
        )
        return self._answers.add(self.client, request)

    def cancel(self, request_id: str) -> None:
        """Stop a request; its stream ends with what it has."""
        if self.client is not None:
            self._answers.cancel(self.client, request_id)

    # --- changing the engine -------------------------------------------------------------------

    async def apply(self, config: JupiterConfig) -> None:
        """Go over to an engine of `config`, or stay with the present one.

        The new config is checked. Where only the split is another, over as many stages, layers
        move between two steps, and that is all. Else running answers are stopped at the end of a
        step, the engine is replaced, has to make a token, and the answers go on where they were.
        If the new engine does not come up, the old one is started again, and they go on there. A
        caller that is cancelled does not end this half done. For another model running answers are
        stopped.

        Raises:
            ConfigError, CheckpointError: the config does not fit; the engine was not touched.
            EngineError: the new engine did not come up; one line that tells what runs now.
        """
        # One that waits for another machine need not wait any longer.
        if self.snapshot.phase not in ("ready", "failed", "recovering"):
            raise EngineError(f"the engine is {self.snapshot.phase}: it cannot be changed now")
        before = self.snapshot
        self._tell(f"checking {_split(config)}")
        self._transaction = asyncio.create_task(self._apply(config, before))
        self._transaction.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(self._transaction)

    async def _apply(self, config: JupiterConfig, before: Snapshot) -> None:
        try:
            await self._check(config, before)
            if self._moves_only(config):
                await self._move(config, before)
                return
            await self._drain(config)
            await self._replace_or_go_back(config)
        except asyncio.CancelledError:
            self._answers.fail(EngineError("the engine was stopped"))
            raise EngineError("the engine was stopped") from None

    async def _check(self, config: JupiterConfig, before: Snapshot) -> None:
        """Look whether the new config fits; meanwhile the engine goes on working."""
        from engine.prepare import prepare_model

        try:
            await prepare_model(config, self._tell)
        except Exception:
            if self._dead:
                self._change(self.snapshot.failed(self._dead))
            else:
                self._change(self.snapshot.settled(before.phase, before.detail))
            raise

    def _moves_only(self, config: JupiterConfig) -> bool:
        """Whether nothing is new but which of the running stages has which layers."""
        old = self.config
        split = config.stage_num_hidden_layers_list
        return (
            self.snapshot.ready is not None
            and not self._dead
            and config.world_size == old.world_size
            and config == replace(old, stage_num_hidden_layers_list=split)
        )

    async def _move(self, config: JupiterConfig, before: Snapshot) -> None:
        """Have the layers moved that change hands; the answers go on meanwhile."""
        assert self.client is not None
        self._tell("moving the layers that change hands")
        try:
            await self.client.resplit(config)
        except EngineError as error:
            if self._dead:
                self._give_up(_first_line(error))
            self._change(self.snapshot.settled(before.phase, before.detail))
            raise
        self.config = config
        self._change(self.snapshot.settled("ready"))

    async def _drain(self, config: JupiterConfig) -> None:
        """Stop the answers at the end of a step, then the engine."""
        if self.client is None:
            return
        self._tell("stopping the answers at the end of a step")
        # Another model would read the tokens of an answer as something else.
        other = config.base_model_name_or_path != self.config.base_model_name_or_path
        self._answers.hold(self.client, for_good=other)
        await self._answers.settled(DRAIN_S)
        self._tell("stopping the stages")
        await self.client.stop()
        await self._answers.settled()

    async def _replace_or_go_back(self, config: JupiterConfig) -> None:
        failure: EngineError | None = None
        was_ready = self.snapshot.ready is not None
        try:
            await self._replace(config)
            self.config = config
        except Exception as error:  # whatever it is, the old engine has to come back
            reason = f"{_split(config)} did not come up: {_first_line(error)}"
            if not was_ready or self._stopped():
                self._give_up(reason)
            try:
                await self._replace(self.config)
            except Exception as second:
                self._give_up(f"{reason}; nor did {_split(self.config)}: {_first_line(second)}")
            failure = EngineError(f"{reason}; the engine is back on {_split(self.config)}")
        assert self.client is not None
        self.error = None
        self._change(self.snapshot.settled("ready"))
        self._answers.go_on(self.client)
        if failure is not None:
            raise failure

    async def _replace(self, config: JupiterConfig) -> None:
        """Start an engine of `config` and have it make a token."""
        self._change(self.snapshot.restarting(config, time.monotonic()))
        await self._launch(config)
        self._tell("trying the engine on one token")
        assert self.client is not None
        stream = self.client.submit(prompt="Hello", params=ONE_TOKEN)
        self._health_check = stream.request_id
        tokens = 0
        try:
            async with asyncio.timeout(HEALTH_S):
                async for event in stream:
                    if isinstance(event, Failed):
                        raise EngineError(event.message)
                    tokens += len(event.token_ids) if isinstance(event, Tokens) else 0
        except TimeoutError:
            raise EngineError(f"it made no token within {HEALTH_S:g} s") from None
        if tokens == 0 or self._dead:
            raise EngineError(self._dead or "it made no token")

    def _give_up(self, reason: str) -> NoReturn:
        """There is no engine any more."""
        error = EngineError(reason)
        self._answers.fail(error)
        if not self._stopped():
            self._change(self.snapshot.failed(reason))
        raise error

    def _tell(self, doing: str) -> None:
        if not self._stopped():
            self._change(self.snapshot.applying(doing))


def _split(config: JupiterConfig) -> str:
    return str(list(config.stage_num_hidden_layers_list))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _real_client(hub: Hub | None = None) -> ClientFactory:
    client = importlib.import_module("engine.client")
    return lambda config, listener: client.EngineClient(config, listener=listener, hub=hub)
