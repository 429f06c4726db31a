"""A key-value store for process groups that only processes which know a secret can use.

torch's `TCPStore` answers whoever reaches its port, and torchrun's c10d rendezvous unpickles what
it reads there. This store answers over a `SecretChannel`, and never unpickles a value.
"""

import socket
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import Store

from peft_dist.distributed import secret_channel
from peft_dist.distributed.secret_channel import SecretChannel, WrongSecret, greet, introduce

MAX_UNPROVEN = 128
"""Connections that may be proving themselves at one time; one more is closed at once."""


_ALL: list["PrivateStore"] = []
"""Process groups hold the C++ half of a store alone, which is nothing without its Python half."""


class StoreServer:
    """Serves one store from threads of this process until it is closed or the process ends.

    Args:
        host: Name or address of this node that the other processes use.
        port: Where to listen; 0 takes any free port.
        secret: What every client must know.

    Raises:
        OSError: Where the port is taken, with errno EADDRINUSE.
    """

    def __init__(self, host: str, port: int, secret: str) -> None:
        """Listen, on the interface that has the host's address alone."""
        self._secret = secret.encode()
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._unproven = threading.Semaphore(MAX_UNPROVEN)
        address = _own_address(host)
        self._listening = socket.create_server((address, port), backlog=1024)
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, name="store", daemon=True).start()

    def close(self) -> None:
        """Accept nobody any more, and let go of the port."""
        self._closed.set()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # else `accept` keeps the port
        self._listening.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listening.accept()
            except OSError:  # closed; or that one connection, or all file descriptors, are gone
                self._closed.wait(0.05)
                continue
            if not self._unproven.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        # Whatever a stranger sends ends its own connection; so does a client that goes away.
        with connection, suppress(OSError, ValueError, KeyError, TypeError, struct.error):
            try:
                channel = greet(connection, self._secret)
            finally:
                self._unproven.release()
            while True:
                request, value = channel.receive()
                answer, found = self._do(request, value)
                channel.send(answer, found)

    def _do(self, request: dict[str, Any], value: bytes) -> tuple[dict[str, Any], bytes]:
        """Carry out one request; return the answer and the value that belongs to it."""
        do, keys = request["do"], request["keys"]
        with self._changed:
            if do == "wait":  # the client sets the limit, and asks again when it has passed
                there = self._changed.wait_for(
                    lambda: all(key in self._values for key in keys), timeout=request["limit_s"]
                )
                return {"ok": there}, self._values.get(keys[0], b"") if there else b""
            if do == "check":
                return {"ok": all(key in self._values for key in keys)}, b""
            if do == "count":
                return {"n": len(self._values)}, b""
            if do == "delete":
                return {"ok": self._values.pop(keys[0], None) is not None}, b""
            if do == "set":
                self._values[keys[0]] = value
            elif do == "append":
                self._values[keys[0]] = self._values.get(keys[0], b"") + value
            elif do == "add":
                number = int(self._values.get(keys[0], b"0")) + int(request["n"])
                self._values[keys[0]] = str(number).encode()
                self._changed.notify_all()
                return {"n": number}, b""
            elif do == "compare_set":
                expected = value[: request["n"]]
                if self._values.get(keys[0], b"") == expected:
                    self._values[keys[0]] = value[request["n"] :]
            else:
                raise ValueError(f"no request {do!r}")
            self._changed.notify_all()
            return {"ok": True}, self._values.get(keys[0], b"")


class PrivateStore(Store):
    """A client of a `StoreServer`, as torch's process groups use a store.

    torch calls it from several threads; each request takes an idle connection or makes one.

    Args:
        host: Where the server is.
        port: Its port.
        secret: What it knows.
        timeout: How long to wait for the server, and then for a key.

    Raises:
        TimeoutError: Where nobody answers within the time.
        WrongSecret: Where somebody else listens there.
    """

    def __init__(self, host: str, port: int, secret: str, timeout: timedelta) -> None:
        """Connect."""
        super().__init__()
        _ALL.append(self)
        self._at, self._secret, self._limit = (host, port), secret.encode(), timeout
        self._idle: list[SecretChannel] = []
        self._lock = threading.Lock()
        self._idle.append(self._connect(within_s=timeout.total_seconds()))

    def set(self, key: str, value: bytes | str) -> None:
        """Give a key a value."""
        self._ask("set", [key], _bytes(value))

    def get(self, key: str) -> bytes:
        """Return the value of a key; wait for it as long as the store's timeout."""
        return self._wait([key], self._limit)

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which starts at 0; return the sum."""
        return int(self._ask("add", [key], n=amount)[0]["n"])

    def append(self, key: str, value: bytes | str) -> None:
        """Add bytes to the end of a value."""
        self._ask("append", [key], _bytes(value))

    def compare_set(self, key: str, expected: bytes | str, desired: bytes | str) -> bytes:
        """Set a key whose value is the expected one; return the value it has then."""
        old = _bytes(expected)
        return self._ask("compare_set", [key], old + _bytes(desired), n=len(old))[1]

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of these keys have a value."""
        return bool(self._ask("check", list(keys))[0]["ok"])

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all of these keys have a value.

        Raises:
            TimeoutError: Where one has not in time.
        """
        self._wait(list(keys), self._limit if timeout is None else timeout)

    def delete_key(self, key: str) -> bool:
        """Remove a key; return whether it was there."""
        return bool(self._ask("delete", [key])[0]["ok"])

    def num_keys(self) -> int:
        """Return how many keys there are."""
        return int(self._ask("count", [])[0]["n"])

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Return the values of several keys; wait for them."""
        return [self.get(key) for key in keys]

    def multi_set(self, keys: Sequence[str], values: Sequence[bytes | str]) -> None:
        """Give several keys their values."""
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def has_extended_api(self) -> bool:
        """Whether `append`, `multi_get` and `multi_set` work."""
        return True

    def set_timeout(self, timeout: timedelta) -> None:
        """Set how long to wait for a key."""
        self._limit = timeout

    @property
    def timeout(self) -> timedelta:
        """How long to wait for a key."""
        return self._limit

    def _wait(self, keys: list[str], limit: timedelta) -> bytes:
        answer, value = self._ask("wait", keys, limit_s=limit.total_seconds())
        if not answer["ok"]:
            raise TimeoutError(f"no value for {', '.join(keys)} within {limit}")
        return value

    def _ask(
        self, do: str, keys: list[str], value: bytes = b"", **more: Any
    ) -> tuple[dict[str, Any], bytes]:
        with self._lock:
            channel = self._idle.pop() if self._idle else None
        channel = channel or self._connect(within_s=secret_channel.HANDSHAKE_S)
        try:
            channel.send({"do": do, "keys": keys, **more}, value)
            answer = channel.receive()
        except BaseException:
            channel.close()
            raise
        with self._lock:
            self._idle.append(channel)
        return answer

    def _connect(self, *, within_s: float) -> SecretChannel:
        deadline = time.monotonic() + within_s
        while True:
            left_s = deadline - time.monotonic()
            try:
                connection = socket.create_connection(self._at, timeout=max(0.1, left_s))
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return introduce(connection, self._secret, limit_s=max(1.0, left_s))
            except WrongSecret:
                raise
            except OSError as error:
                if time.monotonic() >= deadline - 0.2:
                    raise TimeoutError(
                        f"{self._at[0]}:{self._at[1]} does not answer: {error}"
                    ) from error
                time.sleep(0.2)


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def _own_address(host: str) -> str:
    """Return the address to listen at: the host's, or every one where that is loopback alone.

    A name that stands for 127.0.1.1 in this node's own /etc/hosts stands for another address in
    those of the others.
    """
    address = socket.gethostbyname(host)
    is_name = host not in ("localhost", address)
    return "" if is_name and address.startswith("127.") else address
