"""The first machine's end: keeps the others' seats, and passes on what they and the client say.

One thread owns all sockets. The only one that listens beyond this machine is CURVE's, on the
address that was asked for; whoever has no key of the join token gets no answer there.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from engine.errors import ConfigError, EngineError
from engine.nodes.address import Address, own_interface
from engine.nodes.attached import Attached
from engine.nodes.messages import (
    BEAT_S,
    MAX_BYTES,
    Begin,
    Goodbye,
    Prepare,
    ToNode,
)
from engine.nodes.seats import Seat
from engine.nodes.switchboard import Switchboard
from engine.nodes.token import new_token
from engine.nodes.weights import Artifact

HANDSHAKE_MS = 5000
LINGER_MS = 300
GOODBYE_S = 1.0
LISTEN = "--listen"

Lost = Callable[[int, str], None]


class Hub:
    """Where the other machines of a run join; lives as long as the run, over all its engines.

    Args:
        address: to listen on.
        machines: of the run, this one included.

    Raises ConfigError, in one line, when the address is not this machine's or cannot be had.
    """

    def __init__(self, address: Address, machines: int) -> None:
        self.address = address
        self.interface = own_interface(address, LISTEN)
        self.machines = machines
        self.seats = [Seat(number) for number in range(1, machines)]
        """Changed by the hub's thread only."""
        token, server_secret = new_token()
        self.invitation = f"jupiter join {address.text} --token {token.text()}"
        """The command for the other machines."""
        self._prepare: Prepare | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._on_lost: Lost | None = None
        self._context = zmq.Context()
        self._auth = ThreadAuthenticator(self._context)
        self._auth.start()
        self._auth.configure_curve_callback(credentials_provider=_Only(token.client_keys[0]))
        self._router = self._bind(server_secret, token.server_key)
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe()
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._board = Switchboard(
            self._context, self._router, self._poller, self.seats, self._tell_lost, self._notify
        )
        self._closing = self._closed = False
        self._failure = ""
        self._close_at = 0.0
        self._thread = threading.Thread(target=self._run, name="jupiter-hub", daemon=True)
        self._thread.start()

    def _bind(self, secret: bytes, public: bytes) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        router.curve_server = True
        router.curve_secretkey, router.curve_publickey = secret, public
        router.set_hwm(0)  # a machine that does not take what it is sent has soon lost its seat
        router.ipv6 = ":" in self.address.ip
        router.handshake_ivl = HANDSHAKE_MS
        router.heartbeat_ivl, router.heartbeat_timeout = 1000, 3000
        router.maxmsgsize = MAX_BYTES
        router.router_handover = False
        try:
            router.bind(self.address.endpoint)
        except zmq.ZMQError as error:
            self._auth.stop()
            self._context.destroy(linger=0)
            raise ConfigError(
                f"{LISTEN} {self.address.text}: cannot listen there: {error.strerror}"
            ) from None
        return router

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Tell the others that the run is over, and close; idempotent."""
        if self._closed:
            return
        self._call(self._say_goodbye)
        self._closed = True
        self._thread.join()
        self._auth.stop()
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._context.term()

    # --- for the client, on its loop -------------------------------------------------------------

    def follow(self, on_lost: Lost | None) -> None:
        """From now on have `on_lost(number, why)` called on this loop when a machine that works
        leaves, or cannot go on."""
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._on_lost = on_lost

    async def gather(
        self,
        model: tuple[Artifact, list[Path]],
        heads: tuple[Artifact, list[Path]] | None,
        others: int,
        say: Callable[[str], None],
        seats: Collection[int] = (),
    ) -> list[Seat]:
        """Wait until so many other machines are here and have the files of model and heads.

        Args:
            model, heads: as `engine.nodes.weights.describe` gives them.
            others: machines, without this one.
            seats: numbers of those that it has to be, if any have.
            say: gets what is waited for, whenever that is something else.

        Returns their seats. Raises EngineError when one that has worked before cannot have them.
        """
        number = (self._prepare.number if self._prepare else 0) + 1
        same = self._prepare is not None and (self._prepare.model, self._prepare.heads) == (
            model[0],
            heads[0] if heads else None,
        )
        if not same:
            prepare = Prepare(number, model[0], heads[0] if heads else None)
            self._prepare = prepare
            for seat in self.seats:
                seat.why = "" if seat.taken else seat.why
            model_files, head_files = model[1], heads[1] if heads else []
            self._call(lambda: self._board.prepare(prepare, model_files, head_files))
        assert self._prepare is not None
        said = ""
        while True:
            self._changed.clear()
            if self._failure:
                raise EngineError(self._failure)
            able = [seat for seat in self.seats if seat.prepared == self._prepare.number]
            ready = [seat for seat in able if not seats or seat.number in seats]
            if len(ready) >= others:
                return ready[:others]
            for seat in self.seats:
                if seat.taken and seat.why:
                    raise EngineError(f"{seat.title()}: {seat.why}")
            if (text := self._waiting()) != said:
                said = text
                say(text)
            await self._changed.wait()

    def _waiting(self) -> str:
        parts = [seat.doing for seat in self.seats if seat.taken and seat.doing]
        missing = [seat.missing() for seat in self.seats if not seat.taken]
        if missing:
            parts += [*missing, f"run there: {self.invitation}"]
        return "; ".join(parts) or "waiting for the other machines"

    async def steady(self) -> None:
        """Wait until every machine has been heard once more, or is known to be gone."""
        since = time.monotonic()
        while any(seat.taken and seat.heard <= since for seat in self.seats) and not self._failure:
            await asyncio.sleep(BEAT_S / 5)

    # --- for the launch, from any thread ---------------------------------------------------------

    def attach(self, attached: Attached) -> None:
        """Pass on the frames of this launch from now on."""
        self._call(lambda: self._board.attach(attached))

    def detach(self, attached: Attached) -> None:
        """Have the other machines end the workers of this launch; idempotent."""
        self._call(lambda: self._board.detach(attached))

    def begin(self, number: int, begin: Begin) -> None:
        """Have a machine start its workers, or where they run tell it what is new."""
        self._call(lambda: self._board.begin(self.seats[number - 1], begin))

    def post(self, number: int, message: ToNode) -> None:
        """Send something to a machine, if it is there."""
        self._call(lambda: self._board.send(self.seats[number - 1], message))

    def _call(self, call: Callable[[], None]) -> None:
        if self._closed:
            return
        self._calls.put(call)
        os.write(self._wake_write, b"\0")

    # --- on the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing or self._parting():
                ready = dict(self._poller.poll(int(BEAT_S * 1000)))
                if self._wake_read in ready:
                    os.read(self._wake_read, 1)
                    self._calls.get()()
                self._board.serve(ready)
                self._board.beat()
        except Exception as error:
            self._failure = f"{type(error).__name__} in the hub: {error}"
            for seat in self.seats:
                if seat.taken:
                    self._tell_lost(seat.number, self._failure)
            self._notify()
        finally:
            self._board.close()
            self._router.close(linger=LINGER_MS)

    def _tell_lost(self, number: int, why: str) -> None:
        on_lost = self._on_lost
        if self._loop is not None and on_lost is not None:
            with suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(on_lost, number, why)

    def _notify(self) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._changed.set)

    def _say_goodbye(self) -> None:
        self._board.send_to_all(Goodbye())
        self._closing = True
        self._close_at = time.monotonic() + GOODBYE_S

    def _parting(self) -> bool:
        """Whether a machine may not have read the last word: it answers that, and what it has not
        read is lost with the connection."""
        return time.monotonic() < self._close_at and any(seat.taken for seat in self.seats)


class _Only:
    """Lets in who has the join token's key."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        """As ZeroMQ's authenticator asks."""
        return key == self._public
