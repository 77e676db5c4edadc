"""Machines on one machine: a network namespace for each rank, joined by a bridge, links shaped.

All of it lies in a network and a mount namespace of this process and its children (in a user
namespace too where this is not root), so nothing is seen outside, and nothing is left behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from engine.bench.network.relay import Delay

INSIDE = "JUPITER_BENCH_NETWORK_INSIDE"
SUBNET = "10.77.0"
INTERFACE = "eth0"


def missing() -> str:
    """Why there can be no namespaces here; "" where there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    for program in ("unshare", "ip", "tc", "mount"):
        if shutil.which(program) is None:
            return f"'{program}' is not installed (packages iproute2 and util-linux)"
    trial = "mount -t tmpfs tmpfs /run && ip netns add try0 && ip link add name try0 type bridge"
    done = subprocess.run(
        [*unshare(), "sh", "-c", trial], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        return f"network namespaces are not allowed here: {reason}"
    return ""


def enter(words: Sequence[str]) -> None:
    """Start this program anew inside the namespaces; returns where it is inside already."""
    if os.environ.get(INSIDE) == str(os.getpid()):
        return
    # `unshare` becomes the program that it starts, so the process id stays.
    os.environ[INSIDE] = str(os.getpid())
    command = [*unshare(), sys.executable, "-m", "engine.cli.main", *words]
    sys.stdout.flush()
    os.execvp(command[0], command)


def unshare() -> list[str]:
    """The beginning of a command line that runs the rest in namespaces of its own."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--net", "--mount"]


class Rig:
    """The namespaces of some ranks; only to be made inside, see `enter`."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._delay: Delay | None = None
        _run("mount -t tmpfs tmpfs /run")  # where named namespaces are kept: of these processes
        _run("ip link set lo up")
        _run("ip link add name hub0 type bridge")
        _run("ip link set hub0 up")
        for rank in range(ranks):
            _run(f"ip netns add {_name(rank)}")
            _run(f"ip link add name port{rank} type veth peer name {INTERFACE} netns {_name(rank)}")
            _run(f"ip link set port{rank} master hub0 up")
            _run(f"ip -n {_name(rank)} address add {address(rank)}/24 dev {INTERFACE}")
            _run(f"ip -n {_name(rank)} link set {INTERFACE} up")
            _run(f"ip -n {_name(rank)} link set lo up")

    def shape(self, mbit: int) -> None:
        """Let every rank send at so many million bits per second, from now on."""
        burst = max(16, mbit // 4)  # KiB; a timer tick's worth, or the rate is not reached
        for rank in range(self.ranks):
            _run(
                f"tc -n {_name(rank)} qdisc replace dev {INTERFACE} root "
                f"tbf rate {mbit}mbit burst {burst}kb latency 400ms"
            )

    def connect(self, rank: int, *, up: bool) -> None:
        """Plug in a rank's cable, or pull it out."""
        _run(f"ip link set port{rank} {'up' if up else 'down'}")

    def delay(self, ms: float) -> None:
        """Let everything come so much later, from now on; 0 for the machine's own delay."""
        if self._delay is not None:
            self._delay.close()
            self._delay = None
        ports = [f"port{rank}" for rank in range(self.ranks)]
        for port in ports:
            _run(f"ip link set {port} " + ("nomaster" if ms else "master hub0"))
        if ms:
            self._delay = Delay(ports, ms)

    def command(self, rank: int, words: Sequence[str]) -> list[str]:
        """A command line that runs `words` as a rank's machine would."""
        return ["ip", "netns", "exec", _name(rank), *words]


def address(rank: int) -> str:
    """The address of a rank; of its namespace alone."""
    return f"{SUBNET}.{rank + 1}"


def _name(rank: int) -> str:
    return f"rank{rank}"


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)
