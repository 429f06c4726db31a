"""Check every node of a job before training: devices, code, inputs, clock, disk and links.

One process per node. All meet at the first node, the head, which gives orders and judges what
comes back. Ends within its time limit, whatever hangs, and trains nothing.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from peft_dist.checks.checks import CHECKS, GPUS, Looking
from peft_dist.checks.context import CheckContext
from peft_dist.checks.finding import Finding
from peft_dist.common import console
from peft_dist.common.console import say
from peft_dist.common.env import NONCE
from peft_dist.common.errors import EXIT_CRASHED, EXIT_DONE, EXIT_USER_ERROR
from peft_dist.common.sharing import set_run_umask
from peft_dist.common.time_limit import within
from peft_dist.preflight.arrival import Arrivals
from peft_dist.preflight.inputs import inputs_of_run
from peft_dist.preflight.node_info import NodeFacts, gather, told
from peft_dist.preflight.verdict import PORT_TAKEN, PreflightLimits, Report, judge, report_path

if TYPE_CHECKING:
    from peft_dist.preflight.network import Member

CONNECT_SHARE = 0.5
"""Part of the time limit in which every node must have come, once it is ready."""
LINKS_SHARE = 0.7
"""Part of what is left then that the search for a link that fails may take."""
LOCAL_SHARE = 1 / 6
"""Part of it that each check of a node has to end, those of its devices after torch is there."""
TORCH_SETTINGS = {
    "TORCH_CPP_LOG_LEVEL": "FATAL",  # what goes wrong is reported in one line
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # else the end of a peer aborts this process
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}
"""For this process alone, before torch is imported."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Take part in the check of a job's nodes, as one of them.

    Exit codes: 0 all is fine; 1 some nodes fail, and the report names them; 2 a fault of no node;
    98 the port is taken. All nodes end with the head's.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if not 0 <= options.index < len(options.hosts.split(",")):
        parser.error(f"--index {options.index} is none of --hosts {options.hosts}")
    # The interpreter's own way out would wait for what hangs.
    code = NodeCheck(options).run()
    console.flush()
    os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft_dist.preflight.main", description=main.__doc__)
    parser.add_argument("--hosts", required=True, help="names of all nodes: node1,node2,...")
    parser.add_argument("--index", type=int, required=True, help="which of them this is, from 0")
    parser.add_argument("--host", help="name of this node (default: from --hosts)")
    parser.add_argument("--head", help="address of the first node (default: its name)")
    parser.add_argument("--port", type=int, required=True, help="where the first node listens")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--devices", type=int, default=0, help="GPUs that a node must have")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="time for all checks")
    parser.add_argument(
        "--arrival-s", type=float, default=1800.0, help="time for all nodes to leave their set-up"
    )
    parser.add_argument("--min-free-gb", type=float, default=1.0)
    parser.add_argument("--max-clock-offset-s", type=float, default=60.0)
    return parser


class NodeCheck:
    """This node's part."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Start the clock that ends the process in any case."""
        self.started_s = time.monotonic()
        self.options = options
        self.hosts: list[str] = options.hosts.split(",")
        self.arrivals = Arrivals(self.hosts)
        waits_s = 0.0 if self.arrivals.folder is None else options.arrival_s
        self.until_s: float = self.started_s + waits_s + options.timeout_s
        self.name: str = options.host or self.hosts[options.index]
        self.head: str = options.head or self.hosts[0]
        self.doing = "itself"
        """What this node waits for, in words."""
        self.limits = PreflightLimits(
            max_clock_offset_s=options.max_clock_offset_s,
            connect_s=options.timeout_s * CONNECT_SHARE,
            arrival_s=options.arrival_s,
        )
        threading.Thread(target=self._watch, name="time limit", daemon=True).start()
        # Should a library hold the interpreter itself, the kernel ends us.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, self.left_s + 2)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to clean up, nothing to explain
        set_run_umask()

    @property
    def left_s(self) -> float:
        """Seconds until everything must have ended."""
        return self.until_s - time.monotonic()

    def run(self) -> int:
        """Check, as the head or as one of the others; return the exit code."""
        if self.options.index == 0:
            with suppress(OSError, TimeoutError):  # what cannot be written is reported below
                within(
                    self.options.timeout_s / 4, lambda: report_path(self.options.run_dir).unlink()
                )
        context = CheckContext(
            environ={**os.environ},
            run_dir=self.options.run_dir,
            min_free_bytes=self.options.min_free_gb * 1e9,
            devices=self.options.devices,
            nodes=len(self.hosts),
            limit_s=self.options.timeout_s * LOCAL_SHARE,
        )
        looking = Looking(context, [check for check in CHECKS if check is not GPUS])
        facts = gather(self.options.index, self.name)
        self.doing = "torch"
        os.environ.update(TORCH_SETTINGS)
        problem = None
        try:  # while the checks wait for disks and addresses
            from peft_dist.preflight import network
        except (ImportError, OSError) as error:  # OSError: a shared library of it
            problem = error
        self.doing = "its own checks"
        facts = replace(facts, findings=told(looking.findings()))
        self.doing = "the recipe's files"
        facts = self._with_inputs(facts, context.limit_s)
        if problem is not None:
            return self._cannot_import(problem, facts)
        self.doing = "its devices"
        facts = network.with_devices(facts, context)
        self.arrivals.announce(self.options.index)
        if self.options.index == 0:
            return self._lead(facts)
        return self._follow(facts)

    def _with_inputs(self, facts: NodeFacts, limit_s: float) -> NodeFacts:
        """Add what this node finds of the recipe's files, where that ends in time."""
        try:
            found = within(limit_s, lambda: inputs_of_run(self.options.run_dir))
        except (OSError, TimeoutError) as error:
            text = f"the recipe's files cannot be compared with those of other nodes: {error}"
            note = Finding("note", "inputs", text)
            return replace(facts, findings=(*facts.findings, note))
        return replace(facts, inputs=found)

    def _lead(self, facts: NodeFacts) -> int:
        from peft_dist.preflight import network
        from peft_dist.preflight.head import HeadNode

        self.doing = "its own port"
        try:
            head = HeadNode(self._member(facts.index), self.hosts)
        except network.PortTaken:
            self._say(f"port {self.options.port} of {self.name} is taken")
            return PORT_TAKEN
        except network.FAULTS as error:
            problem = f"cannot serve at {self.head}:{self.options.port}: {network.brief(error)}"
            report = judge(
                [replace(facts, error=problem)],
                expected_nodes=self.hosts[:1],  # of the others nothing can be known
                limits=self.limits,
            )
            return self._tell(replace(report, nodes=len(self.hosts)))
        self.doing = "the other nodes to come"
        connect_s = self.limits.connect_s
        last_s = self.until_s - (self.options.timeout_s - connect_s)
        head.wait_for_all(facts, self.arrivals, connect_s=connect_s, until_s=last_s)
        # From here on what takes too long is sick, and not late.
        self.until_s = min(self.until_s, time.monotonic() + self.options.timeout_s)
        signal.setitimer(signal.ITIMER_REAL, self.left_s + 2)
        self.doing = "the other nodes' clocks"
        head.compare_clocks(limit_s=self.left_s / 10)
        self.doing = "an all-reduce"
        all_reduce_s = head.check_links(until_s=time.monotonic() + LINKS_SHARE * self.left_s)
        self.doing = "its report"
        report = judge(
            list(head.facts.values()),
            expected_nodes=self.hosts,
            limits=self.limits,
            late=head.late,
        )
        report = replace(report, all_reduce_s=all_reduce_s)
        report = replace(report, warnings=(*report.warnings, *head.warnings))
        code = self._tell(report)
        self.doing = "the other nodes to end"
        faults = {} if report.common else dict(line.split(": ", 1) for line in report.lines)
        head.dismiss(code, faults, limit_s=min(2.0, self.left_s / 2))
        return code

    def _follow(self, facts: NodeFacts) -> int:
        from peft_dist.preflight import network

        self.doing = f"{self.hosts[0]} at {self.head}:{self.options.port}"
        while True:
            is_ready = 0 in self.arrivals.look()  # the head, before we try
            try:
                member = self._member(facts.index)
                break
            except network.FAULTS as error:
                if not is_ready and self.left_s > self.options.timeout_s:
                    continue
                self._say(
                    f"{self.name} cannot reach {self.hosts[0]} at {self.head}:{self.options.port} "
                    f"within {self.limits.connect_s:.3g} s: {network.brief(error)}"
                )
                return EXIT_CRASHED
        self.doing = f"orders of {self.hosts[0]}"
        try:
            # Should no order come, `_watch` is first.
            last = member.serve(facts, until_s=time.monotonic() + self.left_s + 5)
        except network.FAULTS as error:
            self._say(f"{self.name} has lost {self.hosts[0]}: {network.brief(error)}")
            return EXIT_CRASHED
        if last["fault"] is not None:
            self._say(f"{self.name}: {last['fault']}")
        return int(last["code"])

    def _member(self, index: int) -> "Member":
        from peft_dist.preflight import network

        # Another job's nodes may have been given the same port.
        nonce = os.environ.get(NONCE, "")
        key = json.dumps([str(self.options.run_dir), self.hosts, nonce]).encode()
        return network.Member(
            index,
            len(self.hosts),
            network.Address(self.head, self.options.port, hashlib.sha256(key).hexdigest()[:16]),
            limit_s=max(1.0, min(self.limits.connect_s, self.left_s)),
        )

    def _cannot_import(self, error: ImportError | OSError, facts: NodeFacts) -> int:
        """Say that torch is missing; the others learn it from the head's silence."""
        problem = f"torch cannot be imported: {error}"
        if self.options.index != 0:
            self.arrivals.announce(self.options.index, replace(facts, error=problem))
            self._say(f"{self.name}: {problem}")
            return EXIT_CRASHED
        if isinstance(error, ModuleNotFoundError) or len(self.hosts) == 1:
            remedy = "name the right interpreter with python: in the cluster file"
            return self._tell(Report(len(self.hosts), common=f"{problem}; {remedy}"))
        line = f"{self.name}: {problem}"
        return self._tell(Report(len(self.hosts), bad=(self.hosts[0],), lines=(line,)))

    def _tell(self, report: Report) -> int:
        """Write and print the head's report; return its exit code."""
        report = replace(report, seconds=round(time.monotonic() - self.started_s, 3))
        run_dir = self.options.run_dir
        try:
            within(self.left_s / 2, lambda: report.write(run_dir))
        except (OSError, TimeoutError) as error:
            self._say(f"the report cannot be written to {run_dir}: {error}")
        for line in (*report.lines, *(f"warning: {text}" for text in report.warnings)):
            self._say(line)
        if report.ok:
            say(f"peft-dist: pre-flight: {report.summary}")
            return EXIT_DONE
        self._say(report.summary)
        return EXIT_CRASHED if report.common is None else EXIT_USER_ERROR

    def _say(self, text: str) -> None:
        say(f"peft-dist: pre-flight: {' '.join(text.split())}", sys.stderr)

    def _watch(self) -> None:
        while self.left_s > 0:
            time.sleep(max(0.01, min(1.0, self.left_s)))
        self._say(
            f"{self.name} gave up after {time.monotonic() - self.started_s:.0f} s of waiting for "
            f"{self.doing}"
        )
        os._exit(EXIT_CRASHED)


if __name__ == "__main__":
    main()
