"""The workers of one machine that has joined: its share of a launch, and what they say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import zmq

from engine.config import JupiterConfig, parse_config
from engine.endpoint import waiting_frames
from engine.launch import Command, Launch
from engine.logs import EXITS, describe_exit, rank_log, torchrun_log, with_last_lines
from engine.nodes.messages import Answered, Asked, Begin, Change, Ended, Exit, Logged, Queued
from engine.processes import ProcessHandle
from engine.protocol import NODE_PIDS, StageState, decode_event, encode

LOG_BYTES = 1 << 16
"""Of a log, what is sent at a time."""

Telling = Queued | Ended | Exit | Logged | Asked


class Local:
    """The workers here, from `Begin` to `End`.

    Args:
        begin: which ranks, of what run.
        model, heads: this machine's copies.
        interface: by which the stages talk.
        node: number and name of this machine.
        context: of the sockets.
        poller: gets what is to be waited for.
        command: builds the command line that starts the workers; torchrun's without it.

    Raises EngineError, ConfigError.
    """

    def __init__(
        self,
        begin: Begin,
        model: Path,
        heads: Path | None,
        *,
        interface: str,
        node: tuple[int, str],
        context: zmq.Context[zmq.Socket[bytes]],
        poller: zmq.Poller,
        command: Command | None = None,
    ) -> None:
        self._model, self._heads = model, heads
        self._wanted = begin.workers
        self._number, self._name = node
        self._poller = poller
        self._watched: dict[int, ProcessHandle] = {}
        self._gone: list[int] = []
        self._offsets: dict[Path, int] = {}
        self._launch = Launch(
            self._config(begin.config),
            model,
            begin.epoch,
            command,
            ranks=range(begin.first_rank, begin.first_rank + begin.ranks),
            interface=interface,
            spread=True,
        )
        run_dir = self._launch.run_dir
        self._events = self._bound(context, zmq.PULL, run_dir.events)
        self._commands = self._bound(context, zmq.PUB, run_dir.commands)
        self._exchange = self._bound(context, zmq.ROUTER, run_dir.exchange)
        poller.register(self._events, zmq.POLLIN)
        poller.register(self._exchange, zmq.POLLIN)
        try:
            self._launch.change(self._launch.config, begin.epoch, begin.workers)
            self._launch.spawn()
        except BaseException:
            self.close()
            raise

    @property
    def log_dir(self) -> Path:
        """Of the logs here."""
        return self._launch.log_dir

    def _config(self, values: dict[str, object]) -> JupiterConfig:
        own = {"medusa_head_path": str(self._heads)} if self._heads is not None else {}
        return parse_config({**values, **own}, "the first machine's config")

    def _bound(
        self, context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str
    ) -> zmq.Socket[bytes]:
        socket = context.socket(kind)
        socket.set_hwm(0)
        socket.bind(address)
        return socket

    def command(self, frame: bytes) -> None:
        """Give the workers a command."""
        self._commands.send(frame)

    def answer(self, answered: Answered) -> None:
        """Give a worker what it asked the exchange for; one that has ended gets nothing."""
        with suppress(zmq.ZMQError):
            self._exchange.send_multipart([answered.asker, answered.frame], zmq.NOBLOCK)

    def change(self, change: Change | Begin) -> None:
        """What workers that start from now on are told; raises EngineError."""
        self._wanted = change.workers
        self._launch.change(self._config(change.config), change.epoch, change.workers)

    def pause(self) -> None:
        """End the workers; what has torch loaded stays for a while, so that they are soon back."""
        self._launch.add_descendants()
        for pid in list(self._watched):
            self._forget(pid)
            self._launch.kill_worker(pid)

    def resumes(self, begin: Begin, model: Path, heads: Path | None) -> bool:
        """Have the workers back that were paused; False where these are others."""
        ranks = range(begin.first_rank, begin.first_rank + begin.ranks)
        same = (ranks, model, heads) == (self._launch.ranks, self._model, self._heads)
        # A keeper starts another worker when a higher number of them is wanted.
        if not same or any(begin.workers[rank] <= self._wanted[rank] for rank in ranks):
            return False
        self.change(begin)
        return True

    def kill(self, pid: int) -> None:
        """End one worker."""
        self._launch.add_descendants()
        self._launch.kill_worker(pid)

    def news(self) -> Iterator[Telling]:
        """What the workers have said and written, and which have ended; never blocks."""
        yield from self._logged()
        for frame in waiting_frames(self._events):
            yield Queued(self._known(frame))
        for asker in waiting_frames(self._exchange):
            yield Asked(asker, self._exchange.recv())
        for pid in [pid for pid, handle in self._watched.items() if handle.gone()]:
            self._forget(pid)
            self._gone.append(pid)
        if self._gone:
            yield from self._logged()
        while self._gone:
            yield Ended(self._gone.pop(0))

    def launcher_ended(self) -> str:
        """How torchrun has ended, with its last words; "" while it runs."""
        code = self._launch.exit_code()
        if code is None:
            return ""
        return with_last_lines(f"torchrun {describe_exit(code)}", torchrun_log(self.log_dir))

    def close(self) -> None:
        """End all workers and remove their folder; idempotent."""
        for pid in list(self._watched):
            self._forget(pid)
        self._launch.kill_now()
        for socket in (self._events, self._exchange):
            if not socket.closed:
                self._poller.unregister(socket)
            socket.close(linger=0)
        self._commands.close(linger=0)

    def _known(self, frame: bytes) -> bytes:
        """The frame with this machine's mark, where it names a process, which is watched then."""
        envelope = decode_event(frame)
        if envelope is None or not isinstance(envelope.body, StageState):
            return frame
        state = envelope.body
        if 0 < state.pid < NODE_PIDS:
            self._watch(state.pid)
            state = msgspec.structs.replace(state, pid=self._number * NODE_PIDS + state.pid)
        state = msgspec.structs.replace(state, node=self._name)
        return encode(msgspec.structs.replace(envelope, body=state))

    def _watch(self, pid: int) -> None:
        if pid in self._watched:
            return
        try:
            handle = self._watched[pid] = ProcessHandle(pid)
        except OSError:
            self._gone.append(pid)
            return
        if handle.fd is not None:
            self._poller.register(handle.fd, zmq.POLLIN)

    def _forget(self, pid: int) -> None:
        handle = self._watched.pop(pid)
        if handle.fd is not None:
            self._poller.unregister(handle.fd)
        handle.close()

    def _logged(self) -> Iterator[Telling]:
        for local, rank in enumerate(self._launch.ranks):
            path = rank_log(self.log_dir, local)
            if path is not None and (data := self._new(path)):
                yield Logged(rank, data)
        for line in self._new(self.log_dir / EXITS).splitlines():
            epoch, rank, pid, code = map(int, line.split())
            yield Exit(epoch, rank, pid, code)

    def _new(self, path: Path) -> bytes:
        """What has been added to a file since it was looked at; whole lines of EXITS, as they are
        written at once."""
        offset = self._offsets.get(path, 0)
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError:
            return b""
        try:
            data = os.pread(fd, LOG_BYTES, offset)
        finally:
            os.close(fd)
        self._offsets[path] = offset + len(data)
        return data
