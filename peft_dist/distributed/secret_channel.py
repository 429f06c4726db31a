"""A connection whose ends prove to each other that they know a secret, and so does every message.

Protocol, over TCP: the server sends 32 random bytes, the client answers with 32 of its own and a
proof, and the server with its proof. Then requests and answers alternate. Each frame is its length
(4 bytes), HMAC-SHA256 over direction, frame number and body (32 bytes), and the body: JSON, a zero
byte, and a value. Eavesdroppers can read the values: they are addresses, not secrets.
"""

import hmac
import json
import secrets
import socket
import struct
import time
from contextlib import suppress
from typing import Any

NONCE_BYTES = 32
MAX_FRAME_BYTES = 1 << 26
"""The longest message that is read, and only from who knows the secret."""
HANDSHAKE_S = 10.0
"""How long a connection may take to prove that it knows the secret."""


class WrongSecret(ConnectionError):
    """The other side of a connection does not know the secret."""


class SecretChannel:
    """One authenticated connection: frames with a number and a proof each."""

    def __init__(self, connection: socket.socket, key: bytes, *, sends: bytes, gets: bytes) -> None:
        self._socket, self._key = connection, key
        self._sends, self._gets = sends, gets
        self._sent = self._got = 0

    def send(self, header: dict[str, Any], value: bytes = b"") -> None:
        """Send a message; raises OSError where the other side is gone."""
        body = json.dumps(header).encode() + b"\0" + value
        proof = _proof(self._key, self._sends, struct.pack("!Q", self._sent), body)
        self._sent += 1
        self._socket.sendall(struct.pack("!I", len(body)) + proof + body)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Return the next message.

        Raises:
            WrongSecret: Where its proof is wrong.
            OSError: Where it is too long, or the other side is gone.
        """
        (length,) = struct.unpack("!I", _read(self._socket, 4))
        if length > MAX_FRAME_BYTES:
            raise ConnectionError(f"a message of {length} bytes")
        proof, body = _read(self._socket, 32), _read(self._socket, length)
        expected = _proof(self._key, self._gets, struct.pack("!Q", self._got), body)
        if not hmac.compare_digest(proof, expected):
            raise WrongSecret("a message was changed on its way")
        self._got += 1
        header, _, value = body.partition(b"\0")
        return json.loads(header), value

    def close(self) -> None:
        """End the connection; who waits for a message gets an error."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def greet(connection: socket.socket, secret: bytes) -> SecretChannel:
    """Prove the server to a client, and the client to the server.

    Raises:
        WrongSecret: Where the client's proof is wrong.
        OSError: Where it sends none in time.
    """
    deadline = time.monotonic() + HANDSHAKE_S
    connection.settimeout(HANDSHAKE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ours = secrets.token_bytes(NONCE_BYTES)
    connection.sendall(ours)
    theirs = _read(connection, NONCE_BYTES, deadline)
    proof = _read(connection, 32, deadline)
    if not hmac.compare_digest(proof, _proof(secret, b"client", ours, theirs)):
        raise WrongSecret("a client does not know the secret")
    connection.sendall(_proof(secret, b"server", ours, theirs))
    _keep_alive(connection)
    key = _proof(secret, b"session", ours, theirs)
    return SecretChannel(connection, key, sends=b"answer", gets=b"request")


def introduce(connection: socket.socket, secret: bytes, *, limit_s: float) -> SecretChannel:
    """Prove this client to a server, and the server to the client.

    Raises:
        WrongSecret: Where the server's proof is wrong, or it rejects ours.
        OSError: Where nothing comes in time.
    """
    deadline = time.monotonic() + limit_s
    connection.settimeout(limit_s)
    theirs, ours = _read(connection, NONCE_BYTES, deadline), secrets.token_bytes(NONCE_BYTES)
    connection.sendall(ours + _proof(secret, b"client", theirs, ours))
    try:
        proof = _read(connection, 32, deadline)
    except ConnectionError as error:
        raise WrongSecret("the server does not accept the secret of this run") from error
    if not hmac.compare_digest(proof, _proof(secret, b"server", theirs, ours)):
        raise WrongSecret("the server does not know the secret of this run")
    _keep_alive(connection)
    key = _proof(secret, b"session", theirs, ours)
    return SecretChannel(connection, key, sends=b"request", gets=b"answer")


def _keep_alive(connection: socket.socket) -> None:
    """Wait for the other side as long as its machine lives; notice in a minute that it does not."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _proof(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"\0".join(parts), "sha256")


def _read(connection: socket.socket, size: int, deadline: float | None = None) -> bytes:
    """Read exactly so many bytes, until a time of the steady clock.

    Raises:
        OSError: Where they do not come.
    """
    data = bytearray()
    while len(data) < size:
        if deadline is not None:  # of all of it: a byte now and then is no progress
            connection.settimeout(max(0.01, deadline - time.monotonic()))
        part = connection.recv(min(size - len(data), 1 << 20))
        if not part:
            raise ConnectionResetError("the other side has closed the connection")
        data += part
    return bytes(data)
