"""The launcher's rendezvous by itself: who needs which secret, and who has not come."""

import os
import threading
from collections.abc import Iterator

import pytest
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousTimeoutError,
)

from peft_dist.common.env import ROUND, STORE_SECRET
from peft_dist.distributed.fixed_nodes import handler
from tests.processes import free_port


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (STORE_SECRET, ROUND):
        monkeypatch.setenv(name, "")  # so that what is set here is taken back
    yield


def node(nodes: int = 1, **settings: str | int) -> RendezvousHandler:
    return handler()(RendezvousParameters("peft-dist", "", "id", nodes, nodes, None, **settings))


def test_a_single_node_makes_a_secret_that_its_workers_inherit() -> None:
    alone = node()
    first = os.environ[STORE_SECRET]
    assert len(first) == 64
    info = alone.next_rendezvous()
    assert (info.rank, info.world_size, os.environ[ROUND]) == (0, 1, "1")
    alone.next_rendezvous()
    assert os.environ[ROUND] == "2"
    alone.shutdown()
    os.environ[STORE_SECRET] = ""
    node()
    assert os.environ[STORE_SECRET] != first


def test_a_secret_that_there_is_stays() -> None:
    os.environ[STORE_SECRET] = "of the job"
    node()
    assert os.environ[STORE_SECRET] == "of the job"


def test_several_nodes_must_be_given_one() -> None:
    with pytest.raises(RendezvousConnectionError, match=f"{STORE_SECRET} is not set"):
        node(2)


def test_nodes_have_the_ranks_that_they_are_given() -> None:
    os.environ[STORE_SECRET] = "of the job"
    port, ranks = free_port(), {}
    every = [node(3, node=index, port=port, join_timeout_s=20) for index in range(3)]

    def join(index: int) -> None:
        ranks[index] = every[index].next_rendezvous().rank

    threads = [threading.Thread(target=join, args=(index,)) for index in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert ranks == {0: 0, 1: 1, 2: 2}
    assert [one.num_nodes_waiting() for one in every] == [0, 0, 0]
    every[0].shutdown()


def test_a_node_that_does_not_come_is_named() -> None:
    os.environ[STORE_SECRET] = "of the job"
    first = node(2, node=0, port=free_port(), join_timeout_s=1)
    with pytest.raises(RendezvousTimeoutError, match="node 1 has not come within 0:00:01"):
        first.next_rendezvous()
    first.shutdown()
