"""The private store: what torch needs of a store works, and a stranger can do nothing with it."""

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as torch_dist

from peft_dist.distributed import secret_channel
from peft_dist.distributed.private_store import MAX_UNPROVEN, PrivateStore, StoreServer
from peft_dist.distributed.secret_channel import HANDSHAKE_S, WrongSecret

SECRET = "a long random text"
SOON = timedelta(seconds=5)
FUZZED = 10_000


@pytest.fixture
def server() -> Iterator[StoreServer]:
    """Return a server of a store at any free port of this machine."""
    server = StoreServer("127.0.0.1", 0, SECRET)
    yield server
    server.close()


def client(server: StoreServer, secret: str = SECRET) -> PrivateStore:
    return PrivateStore("127.0.0.1", server.port, secret, SOON)


def stranger(server: StoreServer) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    assert len(connection.recv(32)) == 32
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Whether the server closes a connection without a word."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_clients_see_each_others_values(server: StoreServer) -> None:
    one, other = client(server), client(server)
    one.set("key", b"\x00\xff value")
    assert other.get("key") == b"\x00\xff value"
    other.append("key", b" and more")
    assert one.multi_get(["key"]) == [b"\x00\xff value and more"]
    assert (one.add("n", 3), other.add("n", -1), one.get("n")) == (3, 2, b"2")
    assert one.compare_set("key", "another", "new") == b"\x00\xff value and more"
    assert one.compare_set("n", "2", "new") == b"new"
    assert other.check(["key", "n"]) and not other.check(["key", "none"])
    assert other.num_keys() == 2
    assert other.delete_key("n") and not other.delete_key("n")


def test_a_key_is_waited_for(server: StoreServer) -> None:
    waiting, setting = client(server), client(server)
    threading.Timer(0.3, setting.set, ["late", b"here"]).start()
    assert waiting.get("late") == b"here"
    with pytest.raises(TimeoutError, match="no value for late, never within 0:00:00.2"):
        waiting.wait(["late", "never"], timedelta(seconds=0.2))


def test_a_request_that_waits_holds_no_other_up(server: StoreServer) -> None:
    store, got = client(server), []
    thread = threading.Thread(target=lambda: got.append(store.get("late")))
    thread.start()
    store.set("other", b"1")
    assert store.get("other") == b"1" and not got
    store.set("late", b"2")
    thread.join(5)
    assert got == [b"2"]


def test_a_process_group_meets_through_it(server: StoreServer) -> None:
    groups: list[torch_dist.ProcessGroup] = []

    def join(rank: int) -> None:
        store = torch_dist.PrefixStore("group", client(server))
        groups.append(torch_dist.ProcessGroupGloo(store, rank, 2, SOON))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    values = [torch.ones(4), 2 * torch.ones(4)]
    works = [group.allreduce([value]) for group, value in zip(groups, values, strict=True)]
    for work in works:
        work.wait()
    assert [value.tolist() for value in values] == [[3.0] * 4] * 2


def test_whoever_does_not_know_the_secret_is_refused_and_named(server: StoreServer) -> None:
    with pytest.raises(WrongSecret, match="does not accept the secret"):
        client(server, "another text")


def test_a_client_believes_no_server_that_does_not_know_the_secret() -> None:
    impostor = StoreServer("127.0.0.1", 0, "another text")
    with pytest.raises(WrongSecret):
        client(impostor)
    impostor.close()


def test_nobody_who_listens_is_told_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(TimeoutError, match=f"127.0.0.1:{port} does not answer"):
        PrivateStore("127.0.0.1", port, SECRET, timedelta(seconds=0.5))


@pytest.mark.slow
def test_ten_thousand_messages_of_a_stranger_change_nothing(server: StoreServer) -> None:
    honest = client(server)
    honest.set("key", b"value")
    random_ = random.Random(7)
    pickle = b"\x80\x04cposix\nsystem\n(S'touch /tmp/pwned'\ntR."
    begin = time.monotonic()
    for number in range(FUZZED):
        connection = stranger(server)
        size = random_.choice((0, 1, 31, 64, 65, 300))
        message = random_.choice((random_.randbytes(size), pickle, struct.pack("!I", 1 << 31)))
        # The last of them are whole: nonce, proof and a request, of the wrong secret.
        connection.sendall(message if number % 2 else random_.randbytes(64) + message)
        if number % 500 == 0:
            assert honest.get("key") == b"value"
        connection.close()
    assert honest.get("key") == b"value" and honest.num_keys() == 1
    assert client(server).get("key") == b"value", "newcomers are served too"
    print(f"{FUZZED} messages in {time.monotonic() - begin:.1f} s")


def test_a_message_that_is_played_again_ends_its_connection(server: StoreServer) -> None:
    sent: list[bytes] = []
    honest = client(server)
    channel = honest._idle[0]
    send = channel._socket.sendall

    class Recording:
        def __getattr__(self, name: str) -> object:
            return getattr(channel_socket, name)

        def sendall(self, data: bytes) -> None:
            sent.append(data)
            send(data)

    channel_socket = channel._socket
    channel._socket = Recording()  # type: ignore[assignment]
    assert honest.add("n", 1) == 1
    channel_socket.sendall(sent[-1])
    assert is_closed(channel_socket)
    assert client(server).get("n") == b"1"


def test_silent_strangers_hold_nobody_up_for_long(server: StoreServer) -> None:
    silent = [stranger(server) for _ in range(MAX_UNPROVEN)]
    one_more = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    assert is_closed(one_more)
    silent.pop().close()
    begin = time.monotonic()
    client(server).set("key", b"value")
    assert time.monotonic() - begin < HANDSHAKE_S
    for connection in silent:
        connection.close()


def test_a_stranger_who_sends_a_byte_now_and_then_gets_no_more_time(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secret_channel, "HANDSHAKE_S", 0.5)
    slow = stranger(server)
    begin = time.monotonic()
    with pytest.raises(ConnectionError):  # of 64 bytes that a proof has, far from all
        for _ in range(60):
            slow.sendall(b"x")
            time.sleep(0.1)
    assert time.monotonic() - begin < 3


def test_a_server_that_is_closed_lets_go_of_its_port(server: StoreServer) -> None:
    server.close()
    StoreServer("127.0.0.1", server.port, "another").close()


def test_it_listens_where_its_host_is_and_nowhere_else(server: StoreServer) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.port), timeout=2)
    taken = server.port
    with pytest.raises(OSError) as error:
        StoreServer("127.0.0.1", taken, SECRET)
    assert os.strerror(error.value.errno) == "Address already in use"
