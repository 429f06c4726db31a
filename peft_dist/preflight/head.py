"""The head of a pre-flight: it gives orders to the other nodes by a store, and finds who fails.

Every wait has a limit, and a node that lets one pass is not spoken to again. Judges no facts.
"""

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch.distributed as torch_dist

from peft_dist.preflight.arrival import Arrivals
from peft_dist.preflight.network import (
    FAULTS,
    NO_ANSWER,
    Answer,
    Member,
    Order,
    wait_for,
)
from peft_dist.preflight.node_info import SILENT, NodeFacts

ROUND_TRIPS = 5
"""Of which the shortest tells most about a clock."""
PAIR_S = 5.0
"""How long two nodes may take for an all-reduce."""
LEAST_S = 0.5  # less is not worth a try
LOOK_EVERY_S = 0.2
GRACE_S = 3.0
"""How much later than its own limit a node may answer."""


class HeadNode:
    """The first node, which gives orders to all others that have come."""

    def __init__(self, member: Member, hosts: Sequence[str]) -> None:
        """Speak for all nodes."""
        self.hosts = hosts
        self.facts: dict[int, NodeFacts] = {}
        self.late: list[int] = []
        """The nodes that never became ready."""
        self.warnings: list[str] = []
        self._unable: list[int] = []
        self._member = member
        self._store = member.store
        self._numbers = [0] * len(hosts)
        self._names = map(str, itertools.count())

    @property
    def others(self) -> list[int]:
        """The nodes that answer."""
        return [
            index
            for index, fact in self.facts.items()
            if index and fact.error != SILENT and index not in self._unable
        ]

    @property
    def _backend(self) -> str:
        on_gpu = all(self.facts[index].device_kind for index in (0, *self.others))
        return "nccl" if on_gpu and torch_dist.is_nccl_available() else "gloo"

    def wait_for_all(
        self, own: NodeFacts, arrivals: Arrivals, *, connect_s: float, until_s: float
    ) -> None:
        """Collect the facts of every node that comes in time.

        Args:
            own: This node's.
            arrivals: Who is ready.
            connect_s: How long a node that is ready may take to connect.
            until_s: When, on our steady clock, no node is waited for any more.
        """
        self.facts[0] = own
        keys = {index: f"facts/{index}" for index in range(1, len(self.hosts))}
        while True:
            seen_s, now = arrivals.look(), time.monotonic()
            missing = [index for index, key in keys.items() if not self._store.check([key])]
            awaited = [
                index
                for index in missing
                if index not in arrivals.unable
                and now < min(until_s, seen_s.get(index, now) + connect_s)
            ]
            if not awaited:
                break
            time.sleep(LOOK_EVERY_S)
        self.late = [index for index in missing if index not in seen_s]
        self.facts |= arrivals.unable
        self._unable = [*arrivals.unable]
        for index, key in keys.items():
            if index not in missing:
                self._read_facts(index, key)

    def _read_facts(self, index: int, key: str) -> None:
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
