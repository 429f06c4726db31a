"""Tell which nodes have left their set-up: until then a node is late, and not sick.

Each leaves a file beside the logs of the start. Without such a folder all count as ready at once.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

from peft_dist.common.atomic import replace_file
from peft_dist.common.env import LOGS, NONCE
from peft_dist.preflight.node_info import NodeFacts


class Arrivals:
    """The nodes of one start that are ready to be checked."""

    def __init__(self, hosts: list[str]) -> None:
        """Read what the batch script exported.

        Args:
            hosts: The names of all nodes.
        """
        logs = os.environ.get(LOGS)
        self.folder = None if logs is None else Path(logs)
        """Where the files are; None where all nodes count as ready."""
        self._hosts = hosts
        self._suffix = f".{os.environ.get(NONCE, '')}.ready"
        began_s = time.monotonic()
        self._seen_s = {} if self.folder else dict.fromkeys(range(len(hosts)), began_s)
        self.unable: dict[int, NodeFacts] = {}
        """The facts of nodes that are there and cannot be checked."""

    def announce(self, index: int, unable: NodeFacts | None = None) -> None:
        """Say that this node is ready, or all that it has to say where it never will be."""
        if self.folder is not None:
            with suppress(OSError):  # then it is known when it connects
                path = self.folder / f"{self._hosts[index]}{self._suffix}"
                replace_file(path, unable.to_json() if unable else "", durable=False)

    def look(self) -> dict[int, float]:
        """Return when, on our steady clock, nodes were first seen to be ready."""
        if self.folder is None:
            return self._seen_s
        # A listing: a network file system remembers for a while that a file is not there.
        ready = {path.name for path in self.folder.glob(f"*{self._suffix}")}
        for index, host in enumerate(self._hosts):
            name = f"{host}{self._suffix}"
            if index not in self._seen_s and name in ready:
                with suppress(OSError, ValueError):
                    text = (self.folder / name).read_text(encoding="utf-8")
                    self.unable[index] = NodeFacts.from_json(text)
                self._seen_s[index] = time.monotonic()
        return self._seen_s
