"""A worker's end of the queue against plain sockets in the client's place."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from engine.endpoint import Endpoint
from engine.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    Command,
    CommandEnvelope,
    Event,
    EventEnvelope,
    Heartbeat,
    Notice,
    StageState,
    StageTelemetry,
    Tokens,
    TrainingStep,
    decode_event,
    encode,
)

EPOCH = 7
TIMEOUT_MS = 5000


class Client:
    """Both sockets of a client, and an endpoint connected to them."""

    def __init__(self, folder: Path, hwm: int = 0) -> None:
        self.context = zmq.Context()
        self.pull = self.context.socket(zmq.PULL)
        self.pull.set_hwm(hwm)
        self.pull.bind(f"ipc://{folder}/e")
        self.pub = self.context.socket(zmq.PUB)
        self.pub.bind(f"ipc://{folder}/c")
        self.endpoint = Endpoint(f"ipc://{folder}/e", f"ipc://{folder}/c", rank=1, epoch=EPOCH)

    def send(self, command: Command, epoch: int = EPOCH) -> None:
        self.pub.send(encode(CommandEnvelope(PROTOCOL_VERSION, epoch, command)))

    def subscribe(self) -> None:
        while not self.endpoint.wait_subscribed(0.01):
            self.send(Heartbeat())

    def receive(self) -> Event:
        assert self.pull.poll(TIMEOUT_MS)
        envelope = decode_event(self.pull.recv())
        assert isinstance(envelope, EventEnvelope)
        assert (envelope.rank, envelope.epoch) == (1, EPOCH)
        return envelope.body

    def receive_until(self, last: Event) -> list[Event]:
        events = [self.receive()]
        while events[-1] != last:
            events.append(self.receive())
        return events


@pytest.fixture
def client(run_base: Path) -> Iterator[Client]:
    """As the real client, it takes in whatever comes."""
    yield from lent(Client(run_base))


@pytest.fixture
def stopped_client(run_base: Path) -> Iterator[Client]:
    """Takes one frame until it is read, as a client that is suspended: the worker must wait."""
    yield from lent(Client(run_base, hwm=1))


def lent(client: Client) -> Iterator[Client]:
    folder = Path(client.pull.last_endpoint.decode().removeprefix("ipc://")).parent
    yield client
    client.endpoint.close(linger_s=0)
    client.context.destroy(linger=0)
    assert not [t for t in threading.enumerate() if t.name.startswith("jupiter")]
    for socket in ("e", "c"):
        (folder / socket).unlink(missing_ok=True)


def telemetry(steps: int) -> StageTelemetry:
    return StageTelemetry(
        layers=1, memory_bytes=1, memory_kind="process", busy_s=0, wait_s=0, steps=steps, rows=1
    )


def training_step(number: int) -> TrainingStep:
    return TrainingStep(
        iteration=number,
        total=number,
        loss=1.0,
        loss_per_head=(1.0,),
        accuracy_per_head=(0.5,),
        lr=1e-3,
        grad_norm=1.0,
        tokens_per_s=1.0,
        memory_bytes=1,
        memory_kind="process",
        elapsed_s=1.0,
        remaining_s=0.0,
    )


def tokens(number: int) -> Tokens:
    return Tokens(request_id="r", token_ids=(number,), text="x")


def test_commands_arrive_in_order_and_heartbeats_stay_out(client: Client) -> None:
    assert not client.endpoint.wait_subscribed(0)
    client.subscribe()
    for name in "abc":
        client.send(Heartbeat())
        client.send(Cancel(name))
    assert [client.endpoint.inbox.get(timeout=5) for _ in range(3)] == [*map(Cancel, "abc")]
    assert client.endpoint.inbox.empty()


def test_a_heartbeat_of_another_launch_is_no_subscription(client: Client) -> None:
    until = time.monotonic() + 5
    while client.pull.poll(0) == 0 and time.monotonic() < until:
        client.send(Heartbeat(), epoch=EPOCH - 1)
        client.pull.poll(10)
    assert "dropped" in getattr(client.receive(), "message", "")  # it was heard
    assert not client.endpoint.wait_subscribed(0)


def test_stale_and_malformed_commands_are_dropped_and_told_once_a_second(client: Client) -> None:
    client.subscribe()
    client.pub.send(b"junk")
    client.send(Cancel("of another launch"), epoch=EPOCH - 1)
    client.pub.send(encode(CommandEnvelope(PROTOCOL_VERSION + 1, EPOCH, Cancel("newer"))))
    client.send(Cancel("good"))
    assert client.endpoint.inbox.get(timeout=5) == Cancel("good")
    began = time.monotonic()
    told = [client.receive()]
    while "3 in all" not in getattr(told[-1], "message", ""):
        told.append(client.receive())
    assert len(told) == 1 or time.monotonic() - began > 0.9 * (len(told) - 1)
    assert client.endpoint.inbox.empty()


def test_no_token_is_lost_and_telemetry_is_the_latest(stopped_client: Client) -> None:
    count = 20_000
    for number in range(count):  # nobody reads yet: nearly all of it waits in the outbox
        stopped_client.endpoint.send(tokens(number))
        stopped_client.endpoint.send(telemetry(number))
    events = stopped_client.receive_until(telemetry(count - 1))
    assert [e for e in events if isinstance(e, Tokens)] == [*map(tokens, range(count))]
    # What the sockets had taken already cannot be called back; all else was replaced.
    assert len([e for e in events if isinstance(e, StageTelemetry)]) < count / 4


def test_notices_steps_and_progress_are_bounded_while_nobody_reads(stopped_client: Client) -> None:
    count = 20_000
    for number in range(count):
        stopped_client.endpoint.send(Notice(f"notice {number}"))
        stopped_client.endpoint.send(training_step(number))
    for done in range(count):
        stopped_client.endpoint.send(StageState(phase="loading", done=done, total=count))
    last = StageState(phase="ready")
    stopped_client.endpoint.send(last)
    events = stopped_client.receive_until(last)
    assert len(events) < count / 4
    assert events[-2] == StageState(phase="loading", done=count - 1, total=count)


def test_close_delivers_what_is_queued(client: Client) -> None:
    reader: list[Event] = []
    thread = threading.Thread(target=lambda: reader.extend(client.receive_until(tokens(999))))
    thread.start()
    for number in range(1000):
        client.endpoint.send(tokens(number))
    client.endpoint.close(linger_s=5)
    thread.join(5)
    assert len(reader) == 1000


def test_close_does_not_wait_for_a_client_that_is_gone(run_base: Path) -> None:
    endpoint = Endpoint(f"ipc://{run_base}/e", f"ipc://{run_base}/c", rank=0, epoch=EPOCH)
    for number in range(1000):
        endpoint.send(tokens(number))
    began = time.monotonic()
    endpoint.close(linger_s=0.2)
    assert time.monotonic() - began < 1.0
    endpoint.close()  # once more does nothing
    endpoint.send(tokens(0))  # and this goes nowhere
