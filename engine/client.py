"""The client's side of the engine: start it, ask it, follow it, stop it. Free of torch.

`EngineClient` lives on one asyncio loop. Everything that happens to it (an event, the end of a
process, a call) is handled there, one after the other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from engine.config import JupiterConfig
from engine.errors import EngineError
from engine.launch import Command, Launch
from engine.logs import rank_log, torchrun_log, with_last_lines
from engine.paths import state_dir
from engine.post_mortem import PostMortem
from engine.prepare import prepare_model
from engine.protocol import (
    Cancel,
    EngineReady,
    EventEnvelope,
    Failed,
    Finished,
    Generate,
    Heartbeat,
    Message,
    SamplingParams,
    Shutdown,
    StageState,
    StageTelemetry,
    Started,
    Tokens,
    TreeChosen,
    WorkerError,
)
from engine.queue_client import CLIENT_RANK, Gone, Item, QueueClient
from engine.request import Answer, RequestStream
from engine.updates import ClientState, Fetching, StateChanged, Update

__all__ = [
    "CLIENT_RANK",
    "ClientState",
    "EngineClient",
    "Fetching",
    "RequestStream",
    "StateChanged",
    "Update",
]

MAX_OPEN_REQUESTS = 4096
HEARTBEAT_S = 1.0
# Before the engine is ready a worker may be waiting for its first heartbeat.
STARTING_HEARTBEAT_S = 0.1
# Seconds that a stop waits for the workers to leave, and then for torchrun to end them.
SHUTDOWN_GRACE_S = 1.5
TERMINATE_GRACE_S = 1.5
# Seconds that torchrun has to take notice of its workers' end; it looks ten times a second.
REAP_S = 0.3
# Seconds that torchrun has to write how its workers ended.
VERDICT_S = 3.0


class EngineClient:
    """One engine: the workers of one config, and the requests to them.

    Args:
        config: the run.
        listener: called on the loop's thread with every Update. Its events carry the sender's
            rank, or CLIENT_RANK (-1) for a Notice of the client itself.
        silence_s: a start fails when for so many seconds no worker says anything.
        command: builds the command line that starts the workers; torchrun's without it.
    """

    def __init__(
        self,
        config: JupiterConfig,
        *,
        listener: Callable[[Update], None] | None = None,
        silence_s: float = 120.0,
        command: Command | None = None,
    ) -> None:
        self.config = config
        self.state = ClientState.STARTING
        self.log_dir = state_dir() / "logs"
        """Folder of all logs; that of the launch once there is one."""
        self._listener = listener
        self._silence_s = silence_s
        self._command = command
        self._dropped_before = 0
        self._epoch = 0
        self._requests = 0
        self._starting: asyncio.Task[EngineReady] | None = None
        self._reset()

    def _reset(self) -> None:
        """Forget the launch before."""
        self.ready: EngineReady | None = None
        self.stages: dict[int, StageState] = {}
        self.telemetry: dict[int, StageTelemetry] = {}
        self.tree: TreeChosen | None = None
        """What the tuner chose last; None where the config names the tree."""
        self._streams: dict[str, RequestStream] = {}
        self._launch: Launch | None = None
        self._queue: QueueClient | None = None
        self._post_mortem: PostMortem | None = None
        self._error: EngineError | None = None
        self._ending: asyncio.Task[None] | None = None
        self._beat_timer: asyncio.TimerHandle | None = None
        self._heard = 0.0
        self._settled = asyncio.Event()  # the engine is ready, or at its end
        self._torchrun_gone = asyncio.Event()
        self._workers_gone = asyncio.Event()

    @property
    def dropped_messages(self) -> int:
        """Frames from workers that were malformed or of another launch."""
        return self._dropped_before + (self._queue.dropped if self._queue else 0)

    def log_path(self, rank: int) -> Path | None:
        """The log file of a rank, None where there is none yet."""
        return rank_log(self.log_dir, rank)

    # --- start and stop --------------------------------------------------------------------------

    async def start(self) -> EngineReady:
        """Fetch the model where needed, check it, start the workers, wait until they are ready.

        There is no deadline while the workers report progress. A client that is DEAD can be
        started again. On any error, cancellation included, no process is left.

        Raises:
            ConfigError, CheckpointError: one line that names what does not fit.
            EngineError: the engine died, was silent for too long, or was stopped meanwhile.
        """
        if self._starting is not None and self.state is not ClientState.DEAD:
            raise EngineError("the engine has been started already")
        again = self.state is ClientState.DEAD
        self._reset()
        self._set_state(ClientState.RESPAWNING if again else ClientState.STARTING)
        self._starting = asyncio.create_task(self._start())
        try:
            return await asyncio.shield(self._starting)
        except asyncio.CancelledError:
            if self._starting.cancelled():
                raise EngineError("the engine was stopped before it was ready") from None
            await self.stop()
            raise
        except Exception as error:
            await self._end(error)
            raise

    async def _start(self) -> EngineReady:
        folder = await prepare_model(self.config, lambda line: self._tell(Fetching(line)))
        self._epoch = max(self._epoch + 1, time.time_ns() // 1_000_000)
        launch = self._launch = Launch(self.config, folder, self._epoch, self._command)
        self.log_dir = launch.log_dir
        self._queue = QueueClient(
            launch.run_dir.events,
            launch.run_dir.commands,
            epoch=self._epoch,
            world_size=self.config.world_size,
            on_batch=self._on_batch,
        )
        pid = launch.spawn()
        self._post_mortem = PostMortem(launch.log_dir)
        self._queue.start(pid)
        self._beat()
        return await self._wait_ready()

    async def _wait_ready(self) -> EngineReady:
        self._heard = time.monotonic()
        while not self._settled.is_set():
            left = self._heard + self._silence_s - time.monotonic()
            if left <= 0:
                raise EngineError(
                    with_last_lines(
                        f"no stage has said anything for {self._silence_s:g} s",
                        torchrun_log(self.log_dir),
                    )
                )
            await _wait(self._settled, left)
        if self.ready is None:
            raise self._error or EngineError("the engine ended before it was ready")
        return self.ready

    async def stop(self) -> None:
        """End the engine, whatever it is doing, and every process of it; idempotent.

        Takes a second as a rule and less than five always. Open requests get an EngineError.
        """
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])
        await self._end(None)

    def kill_now(self) -> None:
        """Kill every process of the engine; for when there is no event loop any more."""
        if self._launch is not None:
            self._launch.kill_now()

    async def _end(self, error: Exception | None) -> None:
        """Bring the engine to its end, once, and wait for that."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._wind_down(error))
        await asyncio.shield(self._ending)

    async def _wind_down(self, error: Exception | None) -> None:
        launch, queue = self._launch, self._queue
        try:
            if launch is not None and queue is not None and launch.exit_code() is None:
                self._set_state(ClientState.DRAINING)
                launch.add_descendants()
                if self.ready is not None:  # all workers are listening
                    queue.publish(Shutdown())
                    await _wait(self._workers_gone, SHUTDOWN_GRACE_S)
                if self._workers_gone.is_set():
                    await _until(lambda: not launch.unreaped(), REAP_S)
                else:
                    launch.terminate()
                    await _wait(self._torchrun_gone, TERMINATE_GRACE_S)
        finally:
            self._release(EngineError(str(error) if error else "the engine was stopped"))

    async def _die(self) -> None:
        """A process of the engine has ended unasked: find out why, end the others, say so."""
        launch, post_mortem = self._launch, self._post_mortem
        assert launch is not None and post_mortem is not None
        error = EngineError("the engine died")
        try:
            self._set_state(ClientState.DRAINING)
            await _until(lambda: self._torchrun_gone.is_set() or post_mortem.clear(), VERDICT_S)
            error = post_mortem.error(launch.exit_code())
        finally:
            self._release(error)

    def _release(self, error: EngineError) -> None:
        """The end itself: no process, no socket, no timer and no waiting request is left."""
        if self._beat_timer is not None:
            self._beat_timer.cancel()
        if self._launch is not None:
            self._launch.kill_now()
        if self._queue is not None:
            self._queue.close()
            self._dropped_before += self._queue.dropped
            self._queue = None
        self._error = error
        self._settled.set()
        for stream in self._streams.values():
            stream.fail(error)
        self._streams.clear()
        self._set_state(ClientState.DEAD, str(error))

    # --- requests --------------------------------------------------------------------------------

    def submit(
        self,
        *,
        messages: Sequence[Message] | None = None,
        prompt: str | None = None,
        params: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
    ) -> RequestStream:
        """Ask: `messages` for a chat answer, or `prompt` for its continuation.

        Raises:
            EngineError: the engine is not ready, or has died; or too many requests are open.
        """
        if (messages is None) == (prompt is None):
            raise ValueError("give either messages or prompt")
        self._requests += 1
        return self.send(
            Generate(
                request_id=f"r{self._requests}",
                messages=None if messages is None else tuple(messages),
                prompt=prompt,
                params=params,
            )
        )

    def send(self, request: Generate) -> RequestStream:
        """As `submit`, for a request whose id the caller has chosen: not "r" and a number.

        Raises:
            EngineError: as `submit`.
        """
        if self._queue is None or self.state not in (ClientState.READY, ClientState.BUSY):
            raise EngineError(str(self._error or f"the engine is {self.state.value}, not ready"))
        if len(self._streams) >= MAX_OPEN_REQUESTS:
            raise EngineError(f"{MAX_OPEN_REQUESTS} requests are open; wait for one to end")
        stream = self._streams[request.request_id] = RequestStream(request.request_id)
        self._queue.publish(request)
        self._set_state(ClientState.BUSY)
        return stream

    def cancel(self, request_id: str) -> None:
        """Have a request end within one step, with `Finished`; nothing if it has ended."""
        if self._queue is not None and request_id in self._streams:
            self._queue.publish(Cancel(request_id))

    # --- what happens ----------------------------------------------------------------------------

    def _beat(self) -> None:
        if self._queue is not None:
            self._queue.publish(Heartbeat())
            delay = HEARTBEAT_S if self.ready else STARTING_HEARTBEAT_S
            self._beat_timer = asyncio.get_running_loop().call_later(delay, self._beat)

    def _on_batch(self, batch: list[Item]) -> None:
        for item in batch:
            if isinstance(item, Gone):
                self._on_gone(item.pid)
            else:
                self._heard = time.monotonic()
                self._on_event(item)
                self._tell(item)

    def _on_gone(self, pid: int) -> None:
        assert self._launch is not None and self._post_mortem is not None
        self._post_mortem.gone(pid)
        if self._launch.exit_code() is not None:
            self._torchrun_gone.set()
        if self._post_mortem.all_gone(self.config.world_size):
            self._workers_gone.set()
        self._on_death()

    def _on_death(self) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._die())

    def _on_event(self, envelope: EventEnvelope) -> None:
        rank, body = envelope.rank, envelope.body
        assert self._launch is not None and self._post_mortem is not None
        match body:
            case StageState():
                self.stages[rank] = body
                if body.pid > 0 and self._post_mortem.reported(rank, body.pid):
                    self._launch.add_descendants()
            case StageTelemetry():
                self.telemetry[rank] = body
            case TreeChosen():
                self.tree = body
            case EngineReady():
                self.ready = body
                self._settled.set()
                self._set_state(ClientState.READY)
            case WorkerError():
                self._post_mortem.last_words(rank, body)
                self._on_death()
            case Started() | Tokens() | Finished() | Failed():
                self._on_answer(body)

    def _on_answer(self, event: Answer) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            return
        stream.put(event)
        if isinstance(event, Finished | Failed):
            del self._streams[event.request_id]
            if not self._streams and self.state is ClientState.BUSY:
                self._set_state(ClientState.READY)

    def _set_state(self, state: ClientState, reason: str = "") -> None:
        if state is not self.state or reason:
            self.state = state
            self._tell(StateChanged(state, reason))

    def _tell(self, update: Update) -> None:
        """A listener's error is its own: it must not stop the engine's work."""
        if self._listener is None:
            return
        try:
            self._listener(update)
        except Exception as error:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "error in the engine's listener", "exception": error}
            )


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


async def _until(test: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not test() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
