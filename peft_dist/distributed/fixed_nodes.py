"""torchrun's rendezvous for nodes that are known before a job starts: `--rdzv-backend peft-dist`.

Node 0 serves a `PrivateStore`, and every node's launcher joins each round of it. Nothing that comes
over the network is unpickled, and nobody joins who does not know the secret of this start. Every
launcher has it in its environment; that of a single node makes one where it has none. torch finds
this module by the entry point `torchrun.handlers`.

Settings (`--rdzv-conf`): `node` (0 to nodes - 1), `host` and `port` of node 0 (port 0: any free
one, for a single node), `join_timeout_s`.
"""

import os
import secrets
import sys
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from peft_dist.common import env
from peft_dist.distributed import forked_ranks, launcher_output
from peft_dist.distributed.private_store import PrivateStore, StoreServer
from peft_dist.distributed.secret_channel import WrongSecret

JOIN_TIMEOUT_S = 120


class FixedNodesRendezvous(RendezvousHandler):
    """Rounds in which every node of a fixed set takes part; its index is its rank."""

    def __init__(self, parameters: RendezvousParameters, secret: str) -> None:
        """Read the settings; connect to nobody yet."""
        self._nodes = parameters.max_nodes
        self._node = parameters.get_as_int("node", 0) or 0
        self._host = str(parameters.get("host", "127.0.0.1"))
        self._port = parameters.get_as_int("port", 0) or 0
        self._timeout = timedelta(
            seconds=parameters.get_as_int("join_timeout_s", JOIN_TIMEOUT_S) or JOIN_TIMEOUT_S
        )
        self._run_id, self._secret = parameters.run_id, secret
        self._server: StoreServer | None = None
        self._store: PrivateStore | None = None
        self._round = 0

    def get_backend(self) -> str:
        """Return the name that torchrun knows this rendezvous by."""
        return "peft-dist"

    @property
    def use_agent_store(self) -> bool:
        """Whether the workers use this store too."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Join the next round, and wait until every node has.

        Raises:
            RendezvousConnectionError: Where node 0 cannot serve or be reached.
            RendezvousTimeoutError: Naming the nodes that have not come.
        """
        store = self._connected()
        self._round += 1
        store.set(self._joined(self._node), b"1")
        store.add(f"joined/{self._round}", 1)
        everyone = [self._joined(node) for node in range(self._nodes)]
        try:
            store.wait(everyone, self._timeout)
        except TimeoutError as error:
            late = [str(node) for node, key in enumerate(everyone) if not store.check([key])]
            raise RendezvousTimeoutError(
                f"node {', '.join(late)} has not come within {self._timeout}"
            ) from error
        # The workers that torchrun starts now inherit it: on each node it counts for itself.
        os.environ[env.ROUND] = str(self._round)
        return RendezvousInfo(
            PrefixStore(f"round/{self._round}", store),
            self._node,
            self._nodes,
            RendezvousStoreInfo(self._host, self._port),
        )

    def is_closed(self) -> bool:
        """Whether nobody may join any more: never, while its launchers live."""
        return False

    def set_closed(self) -> None:
        """Do nothing: every launcher ends by itself."""

    def num_nodes_waiting(self) -> int:
        """Return how many nodes have joined the round after this one: their workers have failed."""
        return self._connected().add(f"joined/{self._round + 1}", 0)

    def get_run_id(self) -> str:
        """Return the id that torchrun was given."""
        return self._run_id

    def shutdown(self) -> bool:
        """Serve nobody new."""
        if self._server is not None:
            self._server.close()
        return True

    def _joined(self, node: int) -> str:
        return f"joined/{self._round}/{node}"

    def _connected(self) -> PrivateStore:
        if self._store is None:
            try:
                if self._node == 0 and self._server is None:
                    self._server = StoreServer(self._host, self._port, self._secret)
                    self._port = self._server.port
                self._store = PrivateStore(self._host, self._port, self._secret, self._timeout)
            except (OSError, WrongSecret) as error:
                raise RendezvousConnectionError(
                    f"cannot meet at {self._host}:{self._port}: {error}"
                ) from error
        return self._store


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """Return what torch makes a handler with; the entry point `torchrun.handlers` names it.

    Raises:
        RendezvousConnectionError: By what is returned, where no secret is known.
    """

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        launcher_output.shorten()
        _restore_tmpdir()
        if parameters.max_nodes == 1 and not os.environ.get(env.STORE_SECRET):
            os.environ[env.STORE_SECRET] = secrets.token_hex(32)  # the workers inherit it
        secret = os.environ.get(env.STORE_SECRET)
        if not secret:
            raise RendezvousConnectionError(
                f"{env.STORE_SECRET} is not set; give every node the same long random text"
            )
        forked_ranks.fork_ranks_of(sys.argv, talks=parameters.get_as_int("node", 0) == 0)
        return FixedNodesRendezvous(parameters, secret)

    return create


def _restore_tmpdir() -> None:
    """Let the workers have the temporary folder that this launcher was not given."""
    before = os.environ.pop(env.TMPDIR, None)
    if before is not None:
        os.environ.pop("TMPDIR", None)
    if before:
        os.environ["TMPDIR"] = before
