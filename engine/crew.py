"""The processes of one launch, with the queue to them: brought up, brought together, ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engine.config import JupiterConfig
from engine.errors import EngineError
from engine.launch import Command, Launch
from engine.nodes.hub import Hub
from engine.nodes.seats import Seat
from engine.nodes.spread import SpreadLaunch
from engine.post_mortem import PostMortem
from engine.protocol import NODE_PIDS, Regroup, Shutdown
from engine.queue_client import Item, QueueClient

# Seconds that a stop waits for the workers to leave, and then for torchrun to end them.
SHUTDOWN_GRACE_S = 1.5
TERMINATE_GRACE_S = 1.5
# Seconds that torchrun has to take notice of its workers' end; it looks ten times a second.
REAP_S = 0.3
# Seconds that a worker which has lost a neighbour has to say that it is ready to meet the others.
REGROUP_S = 1.0
# Seconds until it is clear how one of these ended.
VERDICT_S = 0.5
# Seconds that the last words of a process may come behind the news of its end.
WORDS_S = 0.2
# Seconds until a new worker in the place of a lost one has to have said its first word.
REPLACE_S = 10.0
# The same where another machine has to load torch before.
START_S = 90.0


class Crew:
    """torchrun and the workers that it started.

    Args:
        config: one worker per stage.
        model_folder: the Hugging Face-style folder of the base model.
        epoch: number of the launch; see `regroup`.
        command: builds the command line that starts the workers; torchrun's without it.
        on_batch: called on the event loop with what the workers sent, and who ended.
        nodes: the hub and the seats of the other machines, where there are several.

    Raises EngineError when they cannot be started.
    """

    def __init__(
        self,
        config: JupiterConfig,
        model_folder: Path,
        epoch: int,
        command: Command | None,
        on_batch: Callable[[list[Item]], None],
        nodes: tuple[Hub, list[Seat]] | None = None,
    ) -> None:
        self.epoch = epoch
        self.launch = (
            SpreadLaunch(*nodes, config, model_folder, epoch, command)
            if nodes
            else Launch(config, model_folder, epoch, command)
        )
        self.post_mortem = PostMortem(self.launch.log_dir, epoch)
        self.torchrun_gone = asyncio.Event()
        self.workers_gone = asyncio.Event()
        self._world = config.world_size
        self._reported: set[int] = set()
        """Processes that have spoken in this epoch."""
        self._spoke = asyncio.Event()
        self._broken = False
        """In this epoch a process has ended that is missed."""
        self._node_lost = ""
        """Why another machine has been lost in this epoch."""
        self.queue = QueueClient(
            self.launch.run_dir.events,
            self.launch.run_dir.commands,
            epoch=epoch,
            world_size=config.world_size,
            on_batch=on_batch,
        )
        try:
            self.queue.start(self.launch.spawn())
        except EngineError:
            self.release()
            raise

    def reported(self, rank: int, pid: int) -> None:
        """A worker has said that it is `rank`."""
        self._reported.add(pid)
        self._spoke.set()
        if self.post_mortem.reported(rank, pid):
            self.launch.add_descendants()

    def gone(self, pid: int) -> bool:
        """A process has ended; whether it is missed."""
        torchrun = self.launch.exit_code() is not None
        if torchrun:
            self.torchrun_gone.set()
        missed = self.post_mortem.gone(pid) or torchrun
        self._broken |= missed
        self._spoke.set()
        if self.post_mortem.all_gone(self._world):
            self.workers_gone.set()
        return missed

    def node_lost(self, number: int, cause: str) -> None:
        """Another machine has left, or cannot go on: all its workers are gone."""
        self._node_lost = cause
        for pid in self.post_mortem.living():
            if pid // NODE_PIDS == number:
                self.post_mortem.forget(pid)
        self._broken = True
        self._spoke.set()

    async def verdict(self, seconds: float) -> EngineError:
        """Why a process has ended; waits for up to `seconds` until that is clear."""
        if self._node_lost:
            return EngineError(self._node_lost)
        await until(lambda: self.torchrun_gone.is_set() or self.post_mortem.clear(), seconds)
        await until(lambda: not self.post_mortem.words_missing(), WORDS_S)
        return self.post_mortem.error(self.launch.exit_code())

    async def regroup(self, epoch: int, hung: int | None, *, spare: bool) -> None:
        """Replace the lost workers and have all meet in a new process group, for `epoch`.

        Args:
            epoch: stamped on all messages from now on.
            hung: a rank that has not ended, but does nothing any more.
            spare: the other workers are to keep their weights; those that do not answer are
                replaced as well.

        Raises:
            EngineError: a rank did not come back.
        """
        living, lost = self.post_mortem.living(), {hung, *self.post_mortem.ended_by_themselves()}
        spared = {pid for pid, rank in living.items() if spare and rank not in lost}
        store = self.launch.run_dir.store(epoch)
        self.queue.publish(Regroup(epoch=epoch, store=str(store)))
        anew = self.launch.replace(set(range(self._world)) - {living[pid] for pid in spared}, epoch)
        self.epoch = epoch
        self.queue.change_epoch(epoch)
        self._reported.clear()
        self._broken = False
        self._node_lost = ""
        self.post_mortem = PostMortem(
            self.launch.log_dir, epoch, {pid: living[pid] for pid in spared}
        )
        self._dismiss(living.keys() - spared)
        if not await self._until_spoke(lambda: spared <= self._reported, REGROUP_S):
            deaf = spared - self._reported
            self.launch.replace({living[pid] for pid in deaf}, epoch)
            self._dismiss(deaf)
        here = self.post_mortem.living
        if not await self._until_spoke(
            lambda: len({here()[pid] for pid in self._reported & here().keys()}) == self._world,
            START_S if anew else REPLACE_S,
        ):
            if self._broken:
                raise await self.verdict(VERDICT_S)
            missing = set(range(self._world)) - set(here().values())
            raise EngineError(f"rank {min(missing, default=0)} could not be replaced")

    def _dismiss(self, pids: set[int]) -> None:
        """Kill workers; their end is expected."""
        for pid in pids:
            self.post_mortem.forget(pid)
            self.launch.kill_worker(pid)

    async def _until_spoke(self, test: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not (test() or self._broken) and (left := deadline - time.monotonic()) > 0:
            self._spoke.clear()
            await wait(self._spoke, left)
        return test()

    async def wind_down(self, *, listening: bool) -> None:
        """Have all end in order, by a command where the workers are listening."""
        launch = self.launch
        launch.add_descendants()
        if listening:
            self.queue.publish(Shutdown())
            await wait(self.workers_gone, SHUTDOWN_GRACE_S)
        if self.workers_gone.is_set():
            await until(lambda: not launch.unreaped(), REAP_S)
        else:
            launch.terminate()
            await wait(self.torchrun_gone, TERMINATE_GRACE_S)

    def release(self) -> None:
        """Kill what is left and close the queue; idempotent."""
        self.launch.kill_now()
        self.queue.close()


async def wait(event: asyncio.Event, seconds: float) -> None:
    """Wait for `event`, at most so long."""
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


async def until(test: Callable[[], bool], seconds: float) -> None:
    """Wait until `test` holds, at most so long."""
    deadline = time.monotonic() + seconds
    while not test() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
