"""Machines that join: keys, seats, files, and a hub with agents in this process, without torch."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.config import parse_config
from engine.errors import CheckpointError, ConfigError, EngineError, JupiterError
from engine.nodes.address import Address, own_interface, parse_address
from engine.nodes.agent import Agent
from engine.nodes.exchange import Exchange, Get, Put, decode_values, encode_request
from engine.nodes.gathering import check_spread
from engine.nodes.hub import Hub
from engine.nodes.messages import Join
from engine.nodes.seats import Seat, choose, share_out
from engine.nodes.token import JoinToken, new_token, parse_token
from engine.nodes.weights import Artifact, FileId, Receiver, describe, own_copy, received

PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("JUPITER_CACHE_DIR", str(tmp_path / "cache"))


def model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text(str(folder))  # nothing that a stage reads
    return folder


def test_a_token_survives_being_carried_over_and_a_damaged_one_is_refused() -> None:
    token, _ = new_token()
    assert parse_token(f" {token.text()}\n") == token
    assert token.text() not in repr(token) and len(token.client_keys[0]) == 40
    for text in (token.text()[:-1], token.text()[4:], "", "jt1-", "jt1-ä", token.text() + "A"):
        with pytest.raises(ConfigError, match="join token is damaged") as raised:
            parse_token(text)
        assert text in ("", "jt1-") or text not in str(raised.value)


@pytest.mark.parametrize("text", ["", "host", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:x", "a:1/b"])
def test_an_address_without_host_or_port_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        parse_address(text, "--listen")


def test_only_an_address_of_this_machine_is_listened_on() -> None:
    assert own_interface(parse_address("127.0.0.1:1", "x"), "x") == "lo"
    assert parse_address("[::1]:7", "x").endpoint == "tcp://[::1]:7"
    with pytest.raises(ConfigError, match="name the one address"):
        own_interface(parse_address("0.0.0.0:1", "x"), "x")
    with pytest.raises(ConfigError, match="no address of this machine"):
        own_interface(Address("192.0.2.1:1", "192.0.2.1", 1), "x")


def test_stages_are_shared_out_in_order_the_first_machines_having_more() -> None:
    assert share_out(5, 3) == [range(2), range(2, 4), range(4, 5)]
    assert share_out(2, 2) == [range(1), range(1, 2)]


@pytest.mark.parametrize(
    ("settings", "machines", "told"),
    [
        ({"stage_num_hidden_layers_list": [15, 15]}, 3, "3 machines need one each"),
        ({"stage_num_hidden_layers_list": "auto"}, 2, "name the layers of each stage"),
        (
            {"stage_num_hidden_layers_list": [1, 1], "distributed_backend": "nccl"},
            2,
            "'distributed_backend'",
        ),
    ],
)
def test_a_config_that_cannot_be_spread_is_one_line(
    settings: dict[str, object], machines: int, told: str
) -> None:
    config = parse_config({"base_model_name_or_path": "m", **settings}, "a test")
    with pytest.raises(ConfigError, match=told):
        check_spread(config, machines)


def test_a_machine_gets_its_own_seat_back_before_one_that_is_free() -> None:
    seats = [Seat(1), Seat(2), Seat(3)]

    def join(name: str, instance: str) -> Join:
        return Join(version=1, release="", name=name, instance=instance)

    for seat, name in zip(seats, "ab", strict=False):
        seat.take(join(name, f"{name}1"), name.encode())
    assert choose(seats, join("b", "b1")) is seats[1]  # the same process, over a new connection
    assert choose(seats, join("b", "b2")) is seats[2]
    seats[1].leave("was stopped")
    assert choose(seats, join("b", "b2")) is seats[1]
    assert "node 2 (b), which was stopped" in seats[1].missing()
    seats[1].take(join("b", "b2"), b"b")
    seats[2].take(join("c", "c1"), b"c")
    assert choose(seats, join("d", "d1")) is None


def test_the_exchange_answers_when_all_that_was_asked_for_is_there() -> None:
    exchange: Exchange[str] = Exchange()
    assert exchange.handle("a", encode_request(Get(("x", "y")))) == []
    assert [who for who, _ in exchange.handle("b", encode_request(Put("x", b"1")))] == ["b"]
    (b, a) = exchange.handle("b", encode_request(Put("y", b"2")))
    assert (b[0], a[0], decode_values(a[1])) == ("b", "a", (b"1", b"2"))
    assert exchange.handle("c", b"\xc1 no message") == []


def test_a_copy_with_something_else_in_it_is_named(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    artifact, paths = describe(str(folder), folder)
    assert [path.name for path in paths] == ["model.safetensors", "config.json"]
    assert own_copy(artifact) == folder
    model(folder, b"weighty")
    with pytest.raises(CheckpointError, match=r"model/model.safetensors: another file"):
        own_copy(artifact)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: missing"):
        own_copy(artifact)


def test_what_is_received_appears_when_it_is_whole_and_right(tmp_path: Path) -> None:
    weights = os.urandom(600_000)
    artifact, paths = describe("their/place", model(tmp_path / "model", weights))
    assert own_copy(artifact) is None
    receiver = Receiver(artifact)
    while receiver.wanted is not None:
        assert received(artifact) is None
        file, offset = receiver.wanted
        receiver.take(paths[file].read_bytes()[offset : offset + 100_000])
    folder = own_copy(artifact)
    assert folder is not None
    assert (folder / "model.safetensors").read_bytes() == weights


def test_damage_on_the_way_and_names_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    artifact, _ = describe("their/place", model(tmp_path / "model"))
    receiver = Receiver(artifact)
    with pytest.raises(CheckpointError, match="damaged on the way"):
        receiver.take(b"WEIGHTS")
    receiver.close()
    for name in ("../x", "/etc/x", "", "."):
        with pytest.raises(CheckpointError, match="not a plain file name"):
            Receiver(Artifact("m", False, (FileId(name, 1, "0"),)))
    assert list((tmp_path / "cache" / "received").iterdir()) == []


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Hub(parse_address(f"127.0.0.1:{port}", "--listen"), 2) as hub:
        hub.follow(None)
        yield hub
    assert not [t.name for t in threading.enumerate() if t.name.startswith("jupiter-hub")]


class Machine:
    """An agent in a thread of its own."""

    def __init__(self, hub: Hub, token: JoinToken | None = None) -> None:
        self.said: list[str] = []
        token = token or parse_token(hub.invitation.rpartition(" ")[2])
        self._agent = Agent(
            hub.address, token, "b", receive=False, patience_s=PATIENCE_S, say=self.said.append
        )

    async def run(self) -> int | JupiterError:
        """Its exit code, or why it has none."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await asyncio.to_thread(self._agent.run)
        except JupiterError as error:
            return error


async def test_a_machine_is_in_when_its_files_are_the_same_and_leaves_with_the_hub(
    hub: Hub, tmp_path: Path
) -> None:
    folder = model(tmp_path / "model")
    machine = asyncio.create_task(Machine(hub).run())
    said: list[str] = []
    (seat,) = await hub.gather(describe(str(folder), folder), None, 1, said.append)
    assert seat.title() == "node 1 (b)"
    assert hub.invitation in said[0]
    full = await Machine(hub).run()
    assert "all 2 machines are here already" in str(full)
    other = model(tmp_path / "other")
    described = describe(str(other), other)
    model(other, b"changed")
    with pytest.raises(EngineError, match=r"node 1 \(b\): .*another file"):
        await hub.gather(described, None, 1, said.append)  # it stays, and can go back
    assert await hub.gather(describe(str(folder), folder), None, 1, said.append) == [seat]
    await asyncio.to_thread(hub.close)
    assert await machine == 0


async def test_whoever_has_another_token_or_another_model_is_refused(
    hub: Hub, tmp_path: Path
) -> None:
    real = parse_token(hub.invitation.rpartition(" ")[2])
    strange = new_token()[0]
    for token in (
        JoinToken(real.server_public, strange.client_secret),
        JoinToken(strange.server_public, real.client_secret),
    ):
        refused = await Machine(hub, token).run()
        assert isinstance(refused, ConfigError) and "does not take this token" in str(refused)
    folder = model(tmp_path / "model")
    described = describe(str(folder), folder)
    model(folder, b"changed")
    said: list[str] = []
    waiting = asyncio.create_task(hub.gather(described, None, 1, said.append))
    refused = await Machine(hub).run()
    assert isinstance(refused, CheckpointError) and "another file" in str(refused)
    model(folder)
    machine = asyncio.create_task(Machine(hub).run())
    await waiting
    assert any("was of no use: " in line for line in said)
    await asyncio.to_thread(hub.close)
    assert await machine == 0
