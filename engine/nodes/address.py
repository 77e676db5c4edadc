"""Where the machines meet: `HOST:PORT`, and the interface that the stages are to use."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from engine.errors import ConfigError


@dataclass(frozen=True)
class Address:
    """A resolved `HOST:PORT`."""

    text: str
    """As it was given."""
    ip: str
    port: int

    @property
    def endpoint(self) -> str:
        """As ZeroMQ has it."""
        host = f"[{self.ip}]" if ":" in self.ip else self.ip
        return f"tcp://{host}:{self.port}"


def parse_address(text: str, what: str) -> Address:
    """Resolve `HOST:PORT` (an IPv6 address in brackets).

    Raises ConfigError, which begins with `what`.
    """
    try:
        parts = urlsplit(f"tcp://{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.path:
        raise ConfigError(f"{what} {text}: must be HOST:PORT, such as 192.168.1.5:29600")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"{what} {text}: {host}: {error.strerror or error}") from None
    return Address(text, str(found[0][4][0]), port)


def interface_of(ip: str) -> str | None:
    """The network interface of this machine that has the address `ip`; None where none has."""
    wanted = ipaddress.ip_address(ip)
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if ipaddress.ip_address(each.address.partition("%")[0]) == wanted:
                return str(name)
    return None


def own_interface(address: Address, what: str) -> str:
    """The interface of an address to listen on; raises ConfigError when it is not this machine's.

    An address that stands for all interfaces is refused: what is open should be meant to be.
    """
    if ipaddress.ip_address(address.ip).is_unspecified:
        raise ConfigError(
            f"{what} {address.text}: name the one address of this machine that the others reach"
        )
    interface = interface_of(address.ip)
    if interface is None:
        raise ConfigError(f"{what} {address.text}: {address.ip} is no address of this machine")
    return interface


def interface_towards(address: Address) -> str:
    """The interface by which this machine reaches `address`; raises ConfigError without a way."""
    family = socket.AF_INET6 if ":" in address.ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing
        try:
            probe.connect((address.ip, address.port))
            own = str(probe.getsockname()[0])
        except OSError as error:
            raise ConfigError(f"{address.text}: cannot be reached: {error.strerror}") from None
    interface = interface_of(own)
    if interface is None:
        raise ConfigError(f"{address.text}: no interface of this machine has the address {own}")
    return interface
