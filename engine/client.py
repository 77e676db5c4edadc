"""The client's side of the engine: start it, ask it, follow it, stop it. Free of torch.

`EngineClient` lives on one asyncio loop. Everything that happens to it (an event, the end of a
process, a call) is handled there, one after the other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.config import JupiterConfig
from engine.continuity import AnswerStream
from engine.crew import VERDICT_S, Crew, wait
from engine.errors import EngineError, ExitCode
from engine.launch import Command
from engine.logs import rank_log, torchrun_log, with_last_lines
from engine.nodes.gathering import gather, lost_machine
from engine.nodes.hub import Hub
from engine.nodes.seats import Seat
from engine.open_requests import OpenRequests
from engine.paths import state_dir
from engine.prepare import prepare_model
from engine.protocol import (
    Cancel,
    EngineReady,
    EventEnvelope,
    Failed,
    Finished,
    Generate,
    Heartbeat,
    Measure,
    Message,
    Resplit,
    SamplingParams,
    StageState,
    StageTelemetry,
    Started,
    Tokens,
    TreeChosen,
    WorkerError,
)
from engine.queue_client import CLIENT_RANK, Gone, Item
from engine.recovery import ATTEMPTS, Attempts
from engine.request import Answer, RequestStream
from engine.updates import ClientState, Fetching, StateChanged, Update
from engine.watchdog import CHECK_S, Hang, Watchdog

__all__ = [
    "CLIENT_RANK",
    "ClientState",
    "EngineClient",
    "Fetching",
    "RequestStream",
    "StateChanged",
    "Update",
]

HEARTBEAT_S = 1.0
# Before the engine is ready a worker may be waiting for its first heartbeat.
STARTING_HEARTBEAT_S = 0.1
# Seconds that torchrun has to write how its workers ended.
DEATH_VERDICT_S = 3.0
# A neighbour may tell of a loss before the kernel tells of the end of a process.
GRACE_S = 0.1
OPEN_STATES = (ClientState.READY, ClientState.BUSY, ClientState.RECOVERING)
"""In which requests are taken."""


class EngineClient:
    """One engine: the workers of one config, and the requests to them.

    A stage that is lost after the start (it died, hangs, or has no link) is replaced, and open
    requests go on where they were: see docs/recovery.md.

    Args:
        config: the run.
        listener: called on the loop's thread with every Update. Its events carry the sender's
            rank, or CLIENT_RANK (-1) for a Notice of the client itself.
        silence_s: a start fails when for so many seconds no worker says anything.
        command: builds the command line that starts the workers; torchrun's without it.
        hub: has the other machines that the stages are spread over; this one alone without it.
        attempts: how often in a row, without a token in between, a lost stage is replaced; 0 for
            an engine that dies with its first stage.
    """

    def __init__(
        self,
        config: JupiterConfig,
        *,
        listener: Callable[[Update], None] | None = None,
        silence_s: float = 120.0,
        command: Command | None = None,
        attempts: int = ATTEMPTS,
        hub: Hub | None = None,
    ) -> None:
        self.config = config
        """Of the run; a split that is to be planned is, once it is ready."""
        self.state = ClientState.STARTING
        self.log_dir = state_dir() / "logs"
        """Folder of all logs; that of the launch once there is one."""
        self._listener = listener
        self._silence_s = silence_s
        self._command = command
        self._hub = hub
        self._machines: list[Seat] = []
        """The other machines that take part."""
        self._attempts = Attempts(attempts)
        self._watchdog = Watchdog(config.world_size)
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
        self._open = OpenRequests()
        self._crew: Crew | None = None
        self._folder = Path()
        self._up = False
        """The stages are ready for requests."""
        self._error: EngineError | None = None
        self._ending: asyncio.Task[None] | None = None
        self._recovering: asyncio.Task[None] | None = None
        self._timers: dict[Callable[[], None], asyncio.TimerHandle] = {}
        self._heard = 0.0
        self._moved = asyncio.Event()  # the split may be another
        self._settled = asyncio.Event()  # the stages are ready, or something is wrong with them

    @property
    def dropped_messages(self) -> int:
        """Frames from workers that were malformed or of another launch."""
        return self._dropped_before + (self._crew.queue.dropped if self._crew else 0)

    def log_path(self, rank: int) -> Path | None:
        """The log file of a rank, None where there is none yet."""
        return rank_log(self.log_dir, rank)

    def workers(self) -> dict[int, int]:
        """The process of each rank that is up."""
        if self._crew is None:
            return {}
        return {rank: pid for pid, rank in self._crew.post_mortem.living().items()}

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
        self._folder = await prepare_model(self.config, self._say)
        if self.config.auto_split:
            from engine.planning.auto import planned  # it starts clients itself

            self.config = await planned(self.config, self._folder, self._say)
        if self._hub is not None:
            self._hub.follow(self._on_node_lost)
            self._machines = await gather(self._hub, self.config, self._folder, self._say)
        self._launch()
        return await self._wait_ready()

    def _launch(self) -> None:
        """Start the processes, in the place of those that there may be."""
        self._dismiss()
        epoch = self._next_epoch()
        nodes = (self._hub, self._machines) if self._hub is not None else None
        self._crew = Crew(self.config, self._folder, epoch, self._command, self._on_batch, nodes)
        self.log_dir = self._crew.launch.log_dir
        self._beat()

    def _next_epoch(self) -> int:
        self._epoch = max(self._epoch + 1, time.time_ns() // 1_000_000)
        return self._epoch

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
            await wait(self._settled, left)
        if not self._up or self.ready is None:
            raise self._error or EngineError("the engine ended before it was ready")
        return self.ready

    async def stop(self) -> None:
        """End the engine, whatever it is doing, and every process of it; idempotent.

        Takes a second as a rule and less than five always. Open requests get an EngineError.
        """
        for task in (self._starting, self._recovering):
            if task is not None and not task.done():
                task.cancel()
                await asyncio.wait([task])
        await self._end(None)

    def kill_now(self) -> None:
        """Kill every process of the engine; for when there is no event loop any more."""
        if self._crew is not None:
            self._crew.launch.kill_now()

    async def _end(self, error: Exception | None) -> None:
        """Bring the engine to its end, once, and wait for that."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._wind_down(error))
        await asyncio.shield(self._ending)

    async def _wind_down(self, error: Exception | None) -> None:
        try:
            if self._crew is not None and self._crew.launch.exit_code() is None:
                self._set_state(ClientState.DRAINING)
                await self._crew.wind_down(listening=self._up)
        finally:
            self._release(EngineError(str(error) if error else "the engine was stopped"))

    async def _die(self, hang: Hang | None) -> None:
        """A process of the engine has ended unasked: find out why, end the others, say so."""
        error = EngineError(hang.cause if hang else "the engine died")
        try:
            self._set_state(ClientState.DRAINING)
            assert self._crew is not None
            error = error if hang else await self._crew.verdict(DEATH_VERDICT_S)
        finally:
            self._release(error)

    def _release(self, error: EngineError) -> None:
        """The end itself: no process, no socket, no timer and no waiting request is left."""
        self._up = False
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._dismiss()
        self._error = error
        self._settled.set()
        self._moved.set()
        self._open.fail(error)
        self._set_state(ClientState.DEAD, str(error))

    def _dismiss(self) -> None:
        """End the processes that there are, if any."""
        if self._crew is not None:
            self._crew.release()
            self._dropped_before += self._crew.queue.dropped
            self._crew = None

    # --- a lost stage ----------------------------------------------------------------------------

    def _on_loss(self, hang: Hang | None = None) -> None:
        """A process has ended unasked, or one hangs."""
        if self._ending is not None:
            return
        was_up, self._up = self._up, False
        if self._recovering is not None:  # it notices that what it waits for will not come
            self._settled.set()
        elif was_up and self._attempts.limit:
            self._recovering = asyncio.create_task(self._recover(hang))
        else:
            self._ending = asyncio.create_task(self._die(hang))

    async def _recover(self, hang: Hang | None) -> None:
        """Have what was lost replaced, until all works again or there is no more hope."""
        assert self._crew is not None
        if self._hub is not None and (cause := await lost_machine(self._hub, self._machines)):
            hang = Hang(None, cause)
        elif hang is not None and hang.rank is None:
            await asyncio.sleep(GRACE_S)
            hang = None if self._crew.post_mortem.any_gone() else hang
        error = EngineError(hang.cause) if hang else await self._crew.verdict(VERDICT_S)
        try:
            while True:
                delay = self._attempts.next_delay()
                if error.exit_code == ExitCode.BAD_INPUT:
                    break  # it will not be better the next time
                if delay is None:
                    error = EngineError(
                        f"given up after {self._attempts.limit} attempts to recover: {error}"
                    )
                    break
                what = f"recovering, attempt {self._attempts.made}: {error}"
                self._set_state(ClientState.RECOVERING, what)
                await asyncio.sleep(delay)
                try:
                    await self._wait_for_machines()
                    await self._bring_back(hang.rank if hang else None, self._attempts.made)
                    return
                except EngineError as problem:
                    error, hang = problem, None
        except asyncio.CancelledError:
            raise
        except Exception as problem:
            error = EngineError(f"{type(problem).__name__} while recovering: {problem}")
        self._ending = asyncio.create_task(self._give_up(error))

    async def _wait_for_machines(self) -> None:
        """The stages of a machine that has left wait until it is back."""
        if self._hub is None:
            return
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            self._set_state(ClientState.RECOVERING, line)

        self._machines = await gather(
            self._hub, self.config, self._folder, say, [seat.number for seat in self._machines]
        )
        if said:
            self._set_state(ClientState.RECOVERING, "recovering: all machines are here again")

    def _on_node_lost(self, number: int, cause: str) -> None:
        """Another machine has left, or cannot go on."""
        if self._crew is not None and any(seat.number == number for seat in self._machines):
            self._crew.node_lost(number, cause)
            self._on_loss(Hang(None, cause))

    async def _give_up(self, error: EngineError) -> None:
        self._release(error)

    async def _bring_back(self, hung: int | None, attempt: int) -> None:
        """Have the stages work again; raises EngineError when they do not.

        At first only what is lost is replaced, then all workers, at last torchrun as well.
        """
        self._open.lost()
        self._settled.clear()
        self.stages.clear()
        if self._crew is not None and self._crew.launch.exit_code() is None and attempt < 3:
            self._beat()
            # In the middle of a change of split, stages may have one or the other.
            at_rest = self.ready is not None and list(self.ready.stages) == self._split()
            spare = attempt == 1 and at_rest
            await self._crew.regroup(self._next_epoch(), hung, spare=spare)
        else:
            self._launch()
        try:
            await self._wait_ready()
        except EngineError:
            assert self._crew is not None
            if self._settled.is_set():
                raise await self._crew.verdict(VERDICT_S) from None
            raise
        self._recovering = None
        for request in self._open.continuations():
            self._publish(request)
        self._set_state(ClientState.BUSY if len(self._open) else ClientState.READY)

    async def resplit(self, config: JupiterConfig) -> EngineReady:
        """Go over to another split at the same number of stages, in the middle of whatever runs.

        Only layers that change hands move, with their KV rows; see engine/pipeline/resplit.py. A
        stage that is lost meanwhile is replaced on the new split.

        Args:
            config: as the present one but for the split.

        Raises:
            EngineError: the engine is not up, or has died meanwhile.
        """
        if not self._up or self._crew is None:
            raise EngineError(f"the engine is {self.state.value}: its split cannot be changed now")
        self.config = config
        self._crew.launch.config = config
        self._crew.launch.replace((), self._crew.epoch)  # those that start from now on know it
        self._crew.queue.publish(Resplit(split=tuple(self._split())))
        while self.ready is None or list(self.ready.stages) != self._split():
            if self.state is ClientState.DEAD:
                raise self._error or EngineError("the engine died")
            self._moved.clear()
            await self._moved.wait()
        return self.ready

    def _split(self) -> list[int]:
        return list(self.config.stage_num_hidden_layers_list)

    def _watch(self) -> None:
        """Look whether all stages get on."""
        self._later(CHECK_S, self._watch)
        if self._up and (hang := self._watchdog.check()) is not None:
            self._on_loss(hang)

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

    def send(self, request: Generate) -> AnswerStream:
        """As `submit`, for a request whose id the caller has chosen: not "r" and a number.

        Raises:
            EngineError: as `submit`.
        """
        if self.state not in OPEN_STATES:
            raise EngineError(str(self._error or f"the engine is {self.state.value}, not ready"))
        stream = self._open.add(request)
        if self._up:  # else it is sent when the stages are back
            self._publish(stream.continuation())
            self._set_state(ClientState.BUSY)
        return stream

    def _publish(self, request: Generate) -> None:
        assert self._crew is not None
        self._crew.queue.publish(request)

    def cancel(self, request_id: str) -> None:
        """Have a request end within one step, with `Finished`; nothing if it has ended."""
        if request_id not in self._open:
            return
        if self._up and self._crew is not None:
            self._open.cancelled(request_id)
            self._crew.queue.publish(Cancel(request_id))
        else:
            self._open.end_cancelled(request_id)

    def measure(self) -> None:
        """Have stages and links measured once nothing runs; the listener gets a `Profiled`."""
        if self._crew is not None:
            self._crew.queue.publish(Measure())

    # --- what happens ----------------------------------------------------------------------------

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        """Have something done again, once, whatever was said before."""
        if (timer := self._timers.get(call)) is not None:
            timer.cancel()
        self._timers[call] = asyncio.get_running_loop().call_later(seconds, call)

    def _beat(self) -> None:
        if self._crew is not None:
            self._crew.queue.publish(Heartbeat())
            self._later(HEARTBEAT_S if self._up else STARTING_HEARTBEAT_S, self._beat)

    def _on_batch(self, batch: list[Item]) -> None:
        for item in batch:
            if isinstance(item, Gone):
                if self._crew is not None and self._crew.gone(item.pid):
                    self._on_loss()
            elif self._crew is not None and item.epoch == self._crew.epoch:
                self._heard = time.monotonic()
                self._on_event(item)
                self._tell(item)

    def _on_event(self, envelope: EventEnvelope) -> None:
        rank, body = envelope.rank, envelope.body
        assert self._crew is not None
        match body:
            case StageState():
                self.stages[rank] = body
                if body.pid > 0:
                    self._crew.reported(rank, body.pid)
                if body.phase == "lost" and self._up and self._attempts.limit:
                    self._on_loss(Hang(None, f"rank {rank} has lost its link to a neighbour"))
            case StageTelemetry():
                self.telemetry[rank] = body
                self._watchdog.heard(rank, body)
            case TreeChosen():
                self.tree = body
            case EngineReady():
                self._on_ready(body)
            case WorkerError():
                self._crew.post_mortem.last_words(rank, body)
                self._on_loss()
            case Started() | Tokens() | Finished() | Failed():
                self._on_answer(body)

    def _on_ready(self, ready: EngineReady) -> None:
        self.ready = ready
        self._moved.set()
        if self._up:
            return  # only the split is another
        self._up = True
        self._attempts.up()
        if self._attempts.limit:
            self._watchdog.restart()
            self._watch()
        self._settled.set()
        if self._recovering is None:
            self._set_state(ClientState.READY)

    def _on_answer(self, event: Answer) -> None:
        if self._open.take(event):
            self._attempts.progressed()
        if not len(self._open) and self.state is ClientState.BUSY:
            self._set_state(ClientState.READY)

    def _set_state(self, state: ClientState, reason: str = "") -> None:
        if state is not self.state or reason:
            self.state = state
            self._tell(StateChanged(state, reason))

    def _say(self, line: str) -> None:
        self._tell(Fetching(line))

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
