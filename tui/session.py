"""The screen's one hold on the engine: start it, start it anew, ask it, stop it."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from textual.message import Message as UiMessage

from engine.config import JupiterConfig
from engine.errors import JupiterError
from engine.protocol import EngineReady, EventEnvelope, Message, Notice
from tui.messages import EngineChanged, EngineNotice
from tui.snapshot import Snapshot, fold

if TYPE_CHECKING:
    from engine.client import RequestStream, Update


class Client(Protocol):
    """What the screen needs of engine.client.EngineClient."""

    async def start(self) -> EngineReady: ...
    def submit(self, *, messages: Sequence[Message]) -> RequestStream: ...
    def cancel(self, request_id: str) -> None: ...
    async def stop(self) -> None: ...
    def kill_now(self) -> None: ...


ClientFactory = Callable[[JupiterConfig, "Callable[[Update], None]"], Client]


class EngineSession:
    """One engine at a time, over any number of launches.

    Every change is posted as EngineChanged with the snapshot of that moment.
    """

    def __init__(
        self,
        config: JupiterConfig,
        post: Callable[[UiMessage], object],
        make_client: ClientFactory | None = None,
    ) -> None:
        self.config = config
        self.snapshot = Snapshot.before_launch(config)
        self.error: JupiterError | None = None
        """Why the last launch failed, if it did not get ready."""
        self._post = post
        self._make_client = make_client
        self._client: Client | None = None

    async def start(self) -> None:
        """Launch the engine and wait until it is ready or has failed; posts, never raises."""
        if self._stopped():
            return
        self.error = None
        self._change(self.snapshot.launching(time.monotonic()))
        # In a thread: the client's imports take about 0.1 s, and the user may be typing.
        make_client = self._make_client
        if make_client is None:
            make_client = await asyncio.to_thread(_real_client)
        if self._client is not None:
            await self._client.stop()
        if self._stopped():
            return
        launch = self.snapshot.launch
        self._client = make_client(self.config, lambda update: self._learn(launch, update))
        try:
            await self._client.start()
        except JupiterError as error:
            self.error = error
            if not self._stopped():
                self._change(self.snapshot.failed(str(error)))

    def ask(self, messages: Sequence[Message]) -> RequestStream:
        """Send a conversation; raises EngineError when the engine is not ready."""
        assert self._client is not None, "asked before the engine was started"
        return self._client.submit(messages=messages)

    def cancel(self, request_id: str) -> None:
        """Stop a request; its stream ends with what it has."""
        if self._client is not None:
            self._client.cancel(request_id)

    async def stop(self) -> None:
        """Stop the engine for good; no process is left afterwards. Idempotent."""
        self._change(self.snapshot.stopping())
        if self._client is not None:
            await self._client.stop()

    def kill_now(self) -> None:
        """Kill every process of the engine at once; from any thread, when the loop hangs."""
        if self._client is not None:
            self._client.kill_now()

    def _stopped(self) -> bool:
        return self.snapshot.phase == "stopping"

    def _learn(self, launch: int, update: Update) -> None:
        if launch != self.snapshot.launch:
            return  # the last words of an engine that was already replaced
        if isinstance(update, EventEnvelope) and isinstance(update.body, Notice):
            self._post(EngineNotice(f"stage {update.rank}: {update.body.message}"))
        else:
            self._change(fold(self.snapshot, update, time.monotonic()))

    def _change(self, snapshot: Snapshot) -> None:
        if snapshot is not self.snapshot:
            self.snapshot = snapshot
            self._post(EngineChanged(snapshot))


def _real_client() -> ClientFactory:
    client = importlib.import_module("engine.client")
    return lambda config, listener: client.EngineClient(config, listener=listener)
