"""One node of a pre-flight: its store, the orders of the head that it follows, all-reduces."""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist

from peft_dist.checks.checks import GPUS, Looking
from peft_dist.checks.context import CheckContext
from peft_dist.checks.gpu_tools import GpuFault, GpuState
from peft_dist.common.library_messages import is_port_taken
from peft_dist.common.time_limit import within
from peft_dist.distributed import rendezvous
from peft_dist.preflight.node_info import NodeFacts, told

FAULTS = (torch_dist.DistError, RuntimeError, OSError, ValueError)
"""What torch, a network, or the other side's bytes may raise; a TimeoutError is an OSError."""
NO_ANSWER = "no answer in time"
MB = 1 << 20

Order = dict[str, Any]
Answer = dict[str, Any]


class PortTaken(Exception):
    """Another program listens where the head should."""


class Address(NamedTuple):
    """Where the nodes of one pre-flight meet."""

    host: str
    port: int
    key: str
    """What tells it from another pre-flight at the same port."""


def brief(error: BaseException) -> str:
    """Return an error's first line, without where in C++ it arose."""
    if isinstance(error, TimeoutError) or re.search("time.?out|timed out", str(error), re.I):
        return NO_ANSWER
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^(\[[^\]]*\]:? *)+", "", lines[0])[:160]


def with_devices(facts: NodeFacts, context: CheckContext) -> NodeFacts:
    """Return a node's facts with those of its GPUs, and with what is wrong with them."""
    seen: list[GpuState] = []

    def look(_environ: Mapping[str, str]) -> list[GpuState] | GpuFault:
        try:  # each is used, so that a broken one shows
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            for device in range(count):
                free, whole = torch.cuda.mem_get_info(device)
                kind = torch.cuda.get_device_name(device)
                seen.append(GpuState(f"GPU {device}", kind, whole, free))
        except FAULTS as error:
            return GpuFault(f"its devices cannot be used: {brief(error)}")
        return seen

    found = Looking(replace(context, look_at_gpus=look), [GPUS]).findings()
    kinds = " and ".join(sorted({gpu.kind for gpu in seen}))
    return replace(facts, device_kind=kinds, findings=(*facts.findings, *told(found)))


class Member:
    """This node, connected to the head or being it."""

    def __init__(self, index: int, size: int, address: Address, *, limit_s: float) -> None:
        """Connect.

        Raises:
            PortTaken: On the head.
            FAULTS: Where there is no connection.
        """
        self.index = index
        self._size = size
        self._address = address
        self._kept: list[Any] = []  # a group that failed may hang in its destructor
        self.store = self._connect(serves=index == 0, limit_s=limit_s)

    def serve(self, facts: NodeFacts, *, until_s: float) -> Order:
        """Tell the head this node's facts and follow its orders; return the last one.

        Raises:
            FAULTS: Where the head is gone, or says nothing more.
        """
        self.store.set(f"facts/{self.index}", facts.to_json())
        number, order = 0, Order()
        while order.get("do") != "end":
            text = wait_for(self.store, f"order/{self.index}/{number}", until_s=until_s)
            order = json.loads(text)
            self.store.set(f"answer/{self.index}/{number}", json.dumps(self.do(order)))
            number += 1
        return order

    def do(self, order: Order) -> Answer:
        """Follow an order: tell the time, take part in an all-reduce, or end."""
        if order["do"] != "sum":
            return {"time": time.time()}
        try:
            # NCCL has no limit of its own that leaves the process alive.
            return {"s": within(order["limit_s"] + 1, lambda: self._all_reduce(order))}
        except FAULTS as error:
            return {"error": brief(error)}

    def _connect(self, *, serves: bool, limit_s: float) -> torch_dist.Store:
        if self._size == 1:
            return torch_dist.HashStore()
        host, port, key = self._address
        try:
            store = rendezvous.connect(host, port, serves, timedelta(seconds=limit_s))
        except FAULTS as error:
            if is_port_taken(error):
                raise PortTaken from error
            raise
        return torch_dist.PrefixStore(f"pre-flight/{key}", store)

    def _all_reduce(self, order: Order) -> float:
        """Sum over some nodes, once to connect and once for the time it takes; return that.

        Raises:
            FAULTS: Where they cannot, or the sum is wrong.
        """
        members, limit_s = order["members"], order["limit_s"]
        rank, size = members.index(self.index), len(members)
        # A connection of its own: the other one is locked while a group waits for its peers.
        store = torch_dist.PrefixStore(order["name"], self._connect(serves=False, limit_s=limit_s))
        self._kept.append(store)
        group: Any
        if order["backend"] == "nccl":
            device = torch.device("cuda", 0)
            options = torch_dist.ProcessGroupNCCL.Options()
            group = torch_dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            device = torch.device("cpu")
            group = torch_dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=limit_s))
        self._kept.append(group)
        for elements in (1, MB // 4):
            values = torch.full((elements,), rank + 1.0, device=device)
            started = time.perf_counter()
            group.allreduce([values]).wait()
            right = bool((values == size * (size + 1) / 2).all())  # waits for a GPU
            seconds = time.perf_counter() - started
            if not right:
                raise ValueError("an all-reduce gives a wrong sum")
        return seconds


def wait_for(store: torch_dist.Store, key: str, *, until_s: float) -> str:
    """Return what somebody sets a key to, waiting until a time of the steady clock.

    Raises:
        FAULTS: Where nobody has, or the store is gone.
    """
    store.wait([key], timedelta(seconds=max(0.01, until_s - time.monotonic())))
    return str(store.get(key).decode())
