"""What `jupiter join` runs: a machine that has its share of the stages, for a first one elsewhere.

One loop. It holds one connection, starts and ends workers as it is told, and passes on what they
and the client say to each other. When the first machine is silent the workers end, and it is
waited for.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable

import zmq

from engine.errors import CheckpointError, ConfigError, EngineError, ExitCode, JupiterError
from engine.launch import Command
from engine.nodes.address import Address, interface_towards
from engine.nodes.line import Line
from engine.nodes.local import Local
from engine.nodes.messages import (
    BEAT_S,
    LOST_S,
    VERSION,
    Answered,
    Beat,
    Begin,
    Change,
    Doing,
    End,
    Failed,
    Goodbye,
    Join,
    Kill,
    Leave,
    Part,
    Prepare,
    Prepared,
    Queued,
    Refused,
    Rejoin,
    Seat,
    ToNode,
    printable,
    release,
)
from engine.nodes.preparation import Preparation
from engine.nodes.token import JoinToken

ASK_EVERY_S = 0.5
FULL_S = 3.0
"""A seat falls free a moment after its machine has left."""
SLOW_S = 3.0
LINGER_MS = 500


class Agent:
    """One machine besides the first.

    Args:
        address: of the first machine.
        token: the run's.
        name: of this machine, for people.
        receive: have model and heads sent, whatever this machine has of its own.
        patience_s: how long the first machine is waited for.
        say: gets a line for people at a time.
        command: builds the command line that starts the workers; torchrun's without it.
    """

    def __init__(
        self,
        address: Address,
        token: JoinToken,
        name: str,
        *,
        receive: bool,
        patience_s: float,
        say: Callable[[str], None],
        command: Command | None = None,
    ) -> None:
        self._address, self._token, self._name = address, token, name
        self._receive, self._patience_s, self._say = receive, patience_s, say
        self._command = command
        self._instance = secrets.token_hex(8)
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._wake_read, self._wake_write = os.pipe()
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._local: Local | None = None
        self._preparation: Preparation | None = None
        self._ready = False
        """The preparation has come to an end."""
        self._waiting_for_part = False
        self._served = False
        """It has been of use."""
        self._began = self._heard = self._looked = time.monotonic()
        self._asked = 0.0
        self._number: int | None = None
        self._line = self._dial()
        self._over = False

    def run(self) -> int:
        """Serve until the run is over; returns the exit code.

        Raises ConfigError, CheckpointError, EngineError: in one line why this machine is not, or no
        longer, part of it.
        """
        try:
            while not self._over:
                self._look()
            self._say("the run is over")
            return ExitCode.OK
        finally:
            self._end()
            if self._preparation is not None:
                self._preparation.close()
            self._line.send(Leave())
            self._line.close(LINGER_MS)
            self._context.term()
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _dial(self) -> Line:
        line = Line(self._context, self._address, self._token)
        self._poller.register(line.socket, zmq.POLLIN)
        return line

    def _look(self) -> None:
        ready = dict(self._poller.poll(int(BEAT_S * 1000)))
        if self._wake_read in ready:
            os.read(self._wake_read, 64)
        for message in self._line.received():
            self._heard = time.monotonic()
            self._handle(message)
        self._prepare_further(None)
        if self._local is not None:
            for told in self._local.news():
                self._line.send(told)
            if self._local is not None and (reason := self._local.launcher_ended()):
                self._end()
                self._line.send(Failed(reason, leaves=False))
        self._beat()

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._looked < BEAT_S:
            return
        self._looked = now
        if self._line.refused():
            raise ConfigError(
                f"{self._address.text} does not take this token; each start of the first machine "
                "has a token of its own: use the command that it shows now"
            )
        silent = now - self._heard
        if self._number is not None:
            self._line.send(Beat())
            if silent > LOST_S:
                self._lose(f"{self._address.text} has been silent for {silent:.1f} s")
        elif now - self._asked >= ASK_EVERY_S:
            if SLOW_S <= silent < SLOW_S + ASK_EVERY_S:
                self._say(f"waiting for {self._address.text}, for {self._patience_s:g} s at most")
            self._asked = now
            self._line.send(
                Join(version=VERSION, release=release(), name=self._name, instance=self._instance)
            )
        if silent > self._patience_s:
            raise EngineError(f"{self._address.text}: not heard of for {self._patience_s:g} s")

    def _handle(self, message: ToNode) -> None:
        match message:
            case Seat(number, of) if self._number is None:
                self._number = number
                self._say(f"joined {self._address.text} as node {number} of {of} (the first is 0)")
            case Refused(reason, passing):
                if not passing or time.monotonic() - self._began > FULL_S:
                    raise ConfigError(f"{self._address.text}: {printable(reason)}")
            case Goodbye():
                self._over = True
            case Rejoin() if self._number is not None:
                self._lose(f"{self._address.text} has not heard this machine for a while")
            case Prepare():
                self._prepare(message)
            case Part(data):
                self._prepare_further(data)
            case Begin():
                self._begin(message)
            case End():
                self._end()
            case _ if self._local is None:
                return
            case Queued(frame):
                self._local.command(frame)
            case Answered():
                self._local.answer(message)
            case Kill(pid):
                self._local.kill(pid)
            case Change():
                self._local.change(message)

    def _lose(self, why: str) -> None:
        """The seat is gone: all ends here, and another is asked for."""
        self._say(f"{why}; its stages here end, and it is waited for")
        self._number = None
        self._began = time.monotonic()
        if self._local is not None:
            self._local.pause()
        self._poller.unregister(self._line.socket)
        self._line.close()
        self._line = self._dial()

    # --- model and heads -------------------------------------------------------------------------

    def _prepare(self, prepare: Prepare) -> None:
        if self._preparation is not None:
            self._preparation.close()
        self._waiting_for_part = False
        self._ready = False
        self._preparation = Preparation(prepare, receive=self._receive, wake=self._wake)
        self._line.send(Doing("comparing its files"))

    def _wake(self) -> None:
        os.write(self._wake_write, b"\0")

    def _prepare_further(self, data: bytes | None) -> None:
        """Go on once it is known what is here, or the part that was asked for has come."""
        preparation = self._preparation
        if preparation is None or self._ready or not preparation.looked:
            return
        if data is None and self._waiting_for_part:
            return
        try:
            if data is not None:
                preparation.take(data)
            wanted = preparation.next()
        except CheckpointError as error:
            self._ready = True  # for nothing: another Prepare may come
            self._refuse(error)
            return
        if text := preparation.progress():
            self._say(text)
            self._line.send(Doing(text))
        self._waiting_for_part = wanted is not None
        if wanted is not None:
            self._line.send(wanted)
            return
        self._ready = self._served = True
        self._say(f"model: {preparation.paths()[0]}, the same as the first machine's")
        self._line.send(Prepared(preparation.number))

    def _refuse(self, error: JupiterError) -> None:
        self._line.send(Failed(str(error), leaves=not self._served))
        if not self._served:
            raise error
        self._say(str(error))

    # --- the workers -----------------------------------------------------------------------------

    def _begin(self, begin: Begin) -> None:
        if self._preparation is None or self._number is None:
            return
        model, heads = self._preparation.paths()
        try:
            if self._local is not None and self._local.resumes(begin, model, heads):
                self._say("running again")
                return
            self._end()
            self._local = Local(
                begin,
                model,
                heads,
                interface=interface_towards(self._address),
                node=(self._number, self._name),
                context=self._context,
                poller=self._poller,
                command=self._command,
            )
        except JupiterError as error:
            self._say(str(error))
            self._line.send(Failed(str(error), leaves=False))
            return
        last = begin.first_rank + begin.ranks - 1
        ranks = f"stage {last}" if begin.ranks == 1 else f"stages {begin.first_rank} to {last}"
        self._say(f"running {ranks}; logs: {self._local.log_dir}")

    def _end(self) -> None:
        if self._local is not None:
            self._local.close()
            self._local = None
