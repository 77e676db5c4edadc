"""The join token: the keys by which a machine and the first one know each other.

Made anew for every run of the first machine, and never stored. Whoever has it may take a place
that is free for as long as that run lasts.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from dataclasses import dataclass

import zmq
from zmq.utils import z85

from engine.errors import ConfigError

PREFIX = "jt1-"
KEY_BYTES = 32


@dataclass(frozen=True, repr=False)
class JoinToken:
    """Keys of CURVE (curve25519), 32 bytes each; never printed by accident."""

    server_public: bytes
    client_secret: bytes

    def text(self) -> str:
        """For people to carry over: letters, digits, - and _."""
        keys = self.server_public + self.client_secret
        check = zlib.crc32(keys).to_bytes(4, "big")
        return PREFIX + base64.urlsafe_b64encode(keys + check).decode().rstrip("=")

    @property
    def server_key(self) -> bytes:
        """As ZeroMQ's options take it."""
        return z85.encode(self.server_public)

    @property
    def client_keys(self) -> tuple[bytes, bytes]:
        """Public and secret key, as ZeroMQ's options take them."""
        secret = z85.encode(self.client_secret)
        return zmq.curve_public(secret), secret


def new_token() -> tuple[JoinToken, bytes]:
    """A token with new keys, and the server's secret one, as ZeroMQ's options take it."""
    server_public, server_secret = zmq.curve_keypair()
    _, client_secret = zmq.curve_keypair()
    return JoinToken(z85.decode(server_public), z85.decode(client_secret)), server_secret


def parse_token(text: str) -> JoinToken:
    """The token that `text` is; raises ConfigError, which does not repeat it."""
    body = text.strip().removeprefix(PREFIX)
    try:
        raw = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    except (binascii.Error, ValueError):
        raw = b""
    keys, check = raw[: 2 * KEY_BYTES], raw[2 * KEY_BYTES :]
    whole = len(keys) == 2 * KEY_BYTES and zlib.crc32(keys).to_bytes(4, "big") == check
    if not text.strip().startswith(PREFIX) or not whole:
        raise ConfigError(
            f"the join token is damaged or cut short; it is the word that begins with {PREFIX} "
            "in the command that the first machine shows"
        )
    return JoinToken(keys[:KEY_BYTES], keys[KEY_BYTES:])
