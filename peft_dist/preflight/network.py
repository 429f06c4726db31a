"""How the nodes of a pre-flight talk: orders of the head by a store, and all-reduces between them.

Every wait has a limit, and a node that lets one pass is not spoken to again. Judges no facts.
"""

import itertools
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist

from peft_dist.common.library_messages import is_port_taken
from peft_dist.common.time_limit import within
from peft_dist.distributed import rendezvous
from peft_dist.preflight.node_info import SILENT, NodeFacts

FAULTS = (torch_dist.DistError, RuntimeError, OSError, ValueError)
"""What torch, a network, or the other side's bytes may raise; a TimeoutError is an OSError."""
ROUND_TRIPS = 5
"""Of which the shortest tells most about a clock."""
PAIR_S = 5.0
"""How long two nodes may take for an all-reduce."""
LEAST_S = 0.5  # less is not worth a try
NO_ANSWER = "no answer in time"
GRACE_S = 3.0
"""How much later than its own limit a node may answer."""
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


def with_devices(facts: NodeFacts, *, limit_s: float) -> NodeFacts:
    """Return a node's facts with those of its GPUs; each is used, so that a broken one shows."""

    def look() -> NodeFacts:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        rooms = [torch.cuda.mem_get_info(device) for device in range(count)]
        free, whole = min(rooms, default=(None, None))
        return replace(facts, devices=count, free_device_bytes=free, device_bytes=whole)

    try:
        return within(limit_s, look)
    except TimeoutError:
        problem = f"its devices do not answer within {limit_s:.3g} s"
    except FAULTS as error:
        problem = f"its devices cannot be used: {brief(error)}"
    return replace(facts, error=facts.error or problem)


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


class Head:
    """The first node, which gives orders to all others that have come."""

    def __init__(self, member: Member, hosts: Sequence[str]) -> None:
        """Speak for all nodes."""
        self.hosts = hosts
        self.facts: dict[int, NodeFacts] = {}
        self.warnings: list[str] = []
        self._member = member
        self._store = member.store
        self._numbers = [0] * len(hosts)
        self._names = map(str, itertools.count())

    @property
    def others(self) -> list[int]:
        """The nodes that answer."""
        return [index for index, fact in self.facts.items() if index and fact.error != SILENT]

    @property
    def _backend(self) -> str:
        on_gpu = all(self.facts[index].devices for index in (0, *self.others))
        return "nccl" if on_gpu and torch_dist.is_nccl_available() else "gloo"

    def wait_for_all(self, own: NodeFacts, *, until_s: float) -> None:
        """Collect the facts of every node that comes in time."""
        self.facts[0] = own
        keys = {index: f"facts/{index}" for index in range(1, len(self.hosts))}
        left_s = max(0.01, until_s - time.monotonic())
        with suppress(*FAULTS):
            self._store.wait([*keys.values()], timedelta(seconds=left_s))
        for index, key in keys.items():
            if not self._store.check([key]):
                continue
            try:
                self.facts[index] = NodeFacts.from_json(self._store.get(key).decode())
            except ValueError:
                error = "speaks another language: its peft-dist is another version"
                self.facts[index] = NodeFacts(index, self.hosts[index], error=error)

    def compare_clocks(self, *, limit_s: float) -> None:
        """Add to the facts of every node how far its clock is ahead of ours."""
        self._ask(self.others, {"do": "time"}, limit_s=limit_s)  # all at once: who lives?
        for index in self.others:
            offset_s, uncertainty_s = 0.0, float("inf")
            for _ in range(ROUND_TRIPS):
                asked, started = time.time(), time.perf_counter()
                answer = self._ask([index], {"do": "time"}, limit_s=limit_s).get(index)
                half_s = (time.perf_counter() - started) / 2
                if answer is not None and "time" in answer and half_s < uncertainty_s:
                    offset_s, uncertainty_s = answer["time"] - (asked + half_s), half_s
            if uncertainty_s < float("inf"):
                self.facts[index] = replace(
                    self.facts[index], clock_offset_s=offset_s, clock_uncertainty_s=uncertainty_s
                )

    def check_links(self, *, until_s: float) -> float | None:
        """Let all nodes that answer sum a tensor, and find out who cannot.

        Returns:
            Seconds for 1 MB; None where it failed, and then facts say why.
        """
        limit_s = 0.3 * (until_s - time.monotonic())
        before = self.others
        seconds, problem = self._all_reduce([0, *before], limit_s)
        if problem is None:
            return seconds
        pairs = self._test_pairs(until_s)
        if not before:
            self._fail(0, f"cannot sum by {self._backend} even alone: {problem}")
        elif any(pairs.values()):
            self._blame(pairs, until_s)
        elif self.others == before:  # nobody is to blame for the failure
            seconds, again = self._all_reduce([0, *before], 0.5 * (until_s - time.monotonic()))
            if again is None:
                self.warnings.append(f"an all-reduce failed before it succeeded: {problem}")
                return seconds
            head = self.hosts[0]
            for index in (0, *before):
                self._fail(index, f"can talk to {head} alone, not all together: {again}")
        return None

    def dismiss(self, code: int, faults: Mapping[str, str], *, limit_s: float) -> None:
        """Send all nodes away with an exit code, each with its own fault."""
        orders = {
            index: {"do": "end", "code": code, "fault": faults.get(host)}
            for index, host in enumerate(self.hosts)
            if index
        }
        for index, order in orders.items():
            self._send(index, order)
        self._collect(self.others, limit_s)  # the store ends with us: who has not read it cannot

    def _test_pairs(self, until_s: float) -> dict[int, str | None]:
        """Return what is wrong between this node and each other one, as far as there is time."""
        found: dict[int, str | None] = {}
        others = self.others
        for tried, index in enumerate(others):
            left_s = until_s - time.monotonic()
            if left_s < LEAST_S:
                break
            _, problem = self._all_reduce([0, index], min(PAIR_S, left_s / (len(others) - tried)))
            if index in self.others:  # and still answers
                found[index] = problem
        return found

    def _blame(self, pairs: Mapping[int, str | None], until_s: float) -> None:
        """Say of each pair that fails whose fault it is."""
        head, by = self.hosts[0], f"by {self._backend}"
        failed = {index: problem for index, problem in pairs.items() if problem is not None}
        remedy = "see that `interface` in the cluster file is one that all nodes have"
        if len(failed) < len(pairs) or len(failed) == 1 < len(self.hosts) - 1:
            for index, problem in failed.items():
                self._fail(index, f"cannot exchange data with {head} {by}: {problem}")
            return
        first = next(iter(failed.values()))
        why: str | None = first
        if len(failed) > 1:
            _, why = self._all_reduce([*failed][:2], min(PAIR_S, until_s - time.monotonic()))
        if why is None:
            self._fail(0, f"no other node can exchange data with it {by}: {first}")
            return
        for index in (0, *self.others):
            self._fail(index, f"no two nodes can exchange data {by}: {why}; {remedy}")

    def _fail(self, index: int, problem: str) -> None:
        known = self.facts[index].error
        error = problem if known is None or problem == SILENT else f"{known}; {problem}"
        self.facts[index] = replace(self.facts[index], error=error)

    def _all_reduce(
        self, members: Sequence[int], limit_s: float
    ) -> tuple[float | None, str | None]:
        """Return how long some nodes take, or why they fail."""
        order: Order = {
            "do": "sum",
            "members": list(members),
            "name": next(self._names),
            "backend": self._backend,
            "limit_s": max(LEAST_S, limit_s),
        }
        answers = self._ask(
            [index for index in members if index],
            order,
            limit_s=order["limit_s"] + GRACE_S,
            own=0 in members,
        )
        silence = {"error": NO_ANSWER}
        problems = [answers.get(index, silence).get("error") for index in members]
        reported = [str(problem) for problem in problems if problem is not None]
        if reported:  # whoever knows more than that it has waited
            return None, next((problem for problem in reported if problem != NO_ANSWER), NO_ANSWER)
        return float(answers[members[0]]["s"]), None

    def _ask(
        self, nodes: Sequence[int], order: Order, *, limit_s: float, own: bool = False
    ) -> dict[int, Answer]:
        """Give some nodes the same order, and follow it too with `own`; return their answers."""
        started = time.monotonic()
        for index in nodes:
            self._send(index, order)
        mine = {0: self._member.do(order)} if own else {}
        left_s = limit_s - (time.monotonic() - started)
        return {**mine, **self._collect(nodes, left_s)}

    def _send(self, index: int, order: Order) -> None:
        self._store.set(f"order/{index}/{self._numbers[index]}", json.dumps(order))
        self._numbers[index] += 1

    def _collect(self, nodes: Sequence[int], limit_s: float) -> dict[int, Answer]:
        """Return the answers to the last orders; who gives none in time is silent from now on."""
        until_s = time.monotonic() + limit_s
        answers = {}
        for index in nodes:
            try:
                key = f"answer/{index}/{self._numbers[index] - 1}"
                answers[index] = json.loads(wait_for(self._store, key, until_s=until_s))
            except FAULTS:
                self._fail(index, SILENT)
        return answers


def wait_for(store: torch_dist.Store, key: str, *, until_s: float) -> str:
    """Return what somebody sets a key to, waiting until a time of the steady clock.

    Raises:
        FAULTS: Where nobody has, or the store is gone.
    """
    store.wait([key], timedelta(seconds=max(0.01, until_s - time.monotonic())))
    return str(store.get(key).decode())
