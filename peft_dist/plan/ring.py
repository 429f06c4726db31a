"""How long processes take to share something, and what each receives: rings, as NCCL and gloo do.

A ring goes through all processes of a node before it leaves it, so that what comes from other nodes
comes in once per node, by whatever adapters it has, and goes on inside. Both kinds of links are
busy at the same time: the slower one counts.
"""

from dataclasses import dataclass
from typing import Self

from peft_dist.plan.candidate import Candidate
from peft_dist.plan.hardware import Hardware


@dataclass(frozen=True)
class Ring:
    """So many processes on so many nodes."""

    processes: int
    nodes: int

    @classmethod
    def of(cls, candidate: Candidate, processes: int) -> Self:
        """Return the ring of so many neighbours among a candidate's processes."""
        on_node = max(1, candidate.processes // candidate.nodes)
        return cls(processes, max(1, -(-processes // on_node)))

    @property
    def on_node(self) -> int:
        """Processes of a node that are in the ring."""
        return max(1, self.processes // self.nodes)

    def passed(self, whole_bytes: int) -> int:
        """Return what each process hands on where something is gathered.

        To sum up something, and give everybody all of it, takes that twice.
        """
        return whole_bytes * (self.processes - 1) // self.processes

    def received(self, whole_bytes: int) -> tuple[int, int]:
        """Return what a process receives: from its node, and as its share from other nodes."""
        passed = self.passed(whole_bytes)
        if self.nodes == 1:
            return passed, 0
        return passed * (self.on_node - 1) // self.on_node, passed // self.on_node

    def seconds(self, whole_bytes: int, hardware: Hardware) -> float:
        """Return how long that takes, over the links of some hardware."""
        assumed, passed = hardware.assumed, self.passed(whole_bytes)
        hops = self.processes - 1
        if self.nodes == 1:
            return passed / (hardware.inside_gb_s * 1e9) + hops * assumed.hop_inside_us * 1e-6
        between = self.on_node * hardware.between_gb_s
        slowest = between if self.on_node == 1 else min(hardware.inside_gb_s, between)
        wait_us = (hops - self.nodes) * assumed.hop_inside_us + self.nodes * assumed.hop_between_us
        return passed / (slowest * 1e9) + max(0.0, wait_us) * 1e-6
