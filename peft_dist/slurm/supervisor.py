"""One node's part of a job: check the node, run its launcher, and say what comes of the run.

`node.sh` starts it on every node. The first one, the head, decides for all and leaves its decision
beside the logs of this start, where the batch script reads it. Imports no torch.
"""

import argparse
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_dist.common import process_identity
from peft_dist.common.atomic import replace_file
from peft_dist.common.console import RANK_LOGS, say
from peft_dist.common.errors import (
    ERROR_PREFIX,
    EXIT_CRASHED,
    EXIT_DO_NOT_RETRY,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    PeftDistError,
)
from peft_dist.launch.local import PASSED_ON, Ended, run_launcher
from peft_dist.preflight.verdict import PORT_TAKEN, Report
from peft_dist.run.directory import LAUNCHED_AT, RunDir, Verdict, error_in_log
from peft_dist.run.lease import end_for, latest, records
from peft_dist.slurm import history, memory_kills
from peft_dist.slurm.failed_nodes import Peers
from peft_dist.slurm.save_lead import lead_s
from peft_dist.slurm.secrets import read_secrets

DECISION_WAIT_S = 60.0
"""How long other nodes wait for the head's decision before they end on their own."""
LOOK_EVERY_S = 5.0
"""Seconds between two looks at how much time is left, and whether the run is cancelled."""


OUT_OF_MEMORY = "ran out of the memory it had asked for"


@dataclass(frozen=True)
class Decision:
    """What comes of the run.

    One of `done`, `stop`, `again`, `again-without`, `port-taken` and `superseded`.
    """

    word: str
    reason: str = ""
    exit_code: int = EXIT_CRASHED

    def __str__(self) -> str:
        """Return the line that the batch script reads."""
        return f"{self.word} {' '.join(self.reason.split())}".strip()


@dataclass(frozen=True)
class Limits:
    """How often a run may start."""

    starts: int
    without_progress: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run this node's share of a job; return its exit code."""
    own, launcher = _split(list(sys.argv[1:] if argv is None else argv))
    parser = argparse.ArgumentParser(prog="peft_dist.slurm.supervisor", description=main.__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--max-starts", type=int, required=True)
    parser.add_argument("--max-starts-without-progress", type=int, required=True)
    parser.add_argument("--secrets", type=Path, help="file of mode 0600 with NAME=value lines")
    parser.add_argument("--no-preflight", action="store_true")
    parser.add_argument("--devices", type=int, default=0, help="GPUs that the node must have")
    parser.add_argument("--preflight-timeout-s", type=float, default=60.0)
    parser.add_argument("--min-free-gb", type=float, default=1.0)
    parser.add_argument("--max-clock-offset-s", type=float, default=60.0)
    options = parser.parse_args(own)
    os.umask(0o077)
    node = Node(options, launcher)
    try:
        decision = node.work()
    except PeftDistError as error:
        say(f"{ERROR_PREFIX}{error}", sys.stderr)
        decision = Decision("stop", str(error), EXIT_USER_ERROR)
    return node.tell(decision)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    place = words.index("--")
    return words[:place], words[place + 1 :]


class Node:
    """This node, in this start of the job."""

    def __init__(self, options: argparse.Namespace, launcher: Sequence[str]) -> None:
        """Read what the batch script exported."""
        self.options = options
        self.launcher = list(launcher)
        self.run = RunDir(options.run_dir)
        self.index = int(os.environ["SLURM_NODEID"])
        self.hosts = os.environ["PEFT_DIST_HOSTS"].split(",")
        self.port = int(os.environ["PEFT_DIST_PORT"])
        self.name = os.environ.get("SLURMD_NODENAME", self.hosts[self.index])
        self.log = Path(os.environ["PEFT_DIST_LOGS"]) / f"{self.name}.log"
        self.decision_file = self.log.with_name("decision")
        self.signals: list[str] = []
        """What came while no launcher ran; it would have ended this process."""
        for number in PASSED_ON:
            signal.signal(number, lambda got, _: self.signals.append(signal.Signals(got).name))
        self.peers = Peers(self.log.parent, name=self.name, nonce=os.environ["PEFT_DIST_NONCE"])

    @property
    def is_head(self) -> bool:
        """Say whether this node decides."""
        return self.index == 0

    def work(self) -> Decision:
        """Check, train, and return what comes of it as far as this node can tell."""
        run = RunDir.open(self.options.run_dir)
        environment = {
            LAUNCHED_AT: repr(time.time()),
            RANK_LOGS: str(self.log.with_suffix("")),
            **({} if self.options.secrets is None else read_secrets(self.options.secrets)),
        }
        verdict_before = run.verdict()
        log_start = self.log.stat().st_size if self.log.exists() else 0
        if self.is_head and len(self.hosts) > 1 and not _is_free(self.hosts[0], self.port):
            return Decision("port-taken", str(self.port))
        if not self.options.no_preflight:
            failed = self._preflight(run)
            if failed is not None:
                return self._within_limits(failed)
        if self.signals:
            return Decision("again", f"stopped by {self.signals[0]}", EXIT_INTERRUPTED)
        if self.is_head:
            threading.Thread(target=_watch, args=(run,), daemon=True).start()
        ended = run_launcher(
            self.launcher,
            environment=environment,
            error_log=None,
            is_lost=self.peers.have_lost_one,
        )
        failure = None
        if ended.signal_name is None and ended.code != EXIT_DONE:
            failure = self.peers.lost or self._failure()
            self.peers.say_failed(failure)
        told = error_in_log(self.log, log_start)
        return self._judge(run, ended, verdict_before, told=told, failure=failure)

    def tell(self, decision: Decision) -> int:
        """Leave the head's decision for all; return this node's exit code."""
        if self.is_head:
            if self._is_superseded():
                decision = Decision("superseded", "the run is another start's", EXIT_DO_NOT_RETRY)
            elif decision.word != "port-taken":
                history.record(self.run.path, self._event(decision))
            replace_file(self.decision_file, f"{decision}\n")
            say(f"peft-dist: {decision}")
            return decision.exit_code
        # Whoever ends first with another code than 0 has srun kill the others, the head among them.
        deadline = time.monotonic() + DECISION_WAIT_S
        while not self.decision_file.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        return EXIT_DONE if self.decision_file.exists() else decision.exit_code

    def _is_superseded(self) -> bool:
        """Say whether another start has taken over the run that this one had."""
        own = process_identity.slurm_job()
        history = records(self.run.attempts)
        of_ours = [own.items() <= record.items() for record in history]
        return any(of_ours) and not of_ours[-1]

    def _event(self, decision: Decision) -> dict[str, Any]:
        return {
            "event": "decided",
            "job": history.this_job(),
            "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            "time": int(time.time()),
            "step": self.run.newest_step(),
            "decision": decision.word,
            "reason": decision.reason,
        }

    def _preflight(self, run: RunDir) -> Decision | None:
        """Return what comes of the run where it cannot start on these nodes."""
        options = self.options
        command = [
            *(sys.executable, "-m", "peft_dist.preflight.main", "--run-dir", str(run.path)),
            *("--hosts", ",".join(self.hosts), "--index", str(self.index), "--host", self.name),
            *("--port", str(self.port + 1), "--devices", str(options.devices)),
            *("--timeout-s", str(options.preflight_timeout_s)),
            *("--min-free-gb", str(options.min_free_gb)),
            *("--max-clock-offset-s", str(options.max_clock_offset_s)),
        ]
        ended = run_launcher(command, environment={}, error_log=None)
        if ended.signal_name is not None:
            return Decision("again", f"stopped by {ended.signal_name}", EXIT_INTERRUPTED)
        if ended.code == EXIT_DONE:
            return None
        if ended.code == PORT_TAKEN:
            return Decision("port-taken", str(self.port + 1))
        report = Report.read(run.path)
        if report is not None and report.common is not None:
            return Decision("stop", f"pre-flight: {report.common}", EXIT_USER_ERROR)
        if report is None or not report.bad:
            return Decision("again", "the pre-flight ended without a verdict")
        bad = self._exclude(report.bad)
        return Decision("again-without", f"{','.join(bad)} pre-flight: {report.lines[0]}")

    def _exclude(self, bad: Sequence[str]) -> list[str]:
        """Remember bad nodes for every later start; return all that are known."""
        file = self.run.path / "slurm" / "excluded"
        known = file.read_text(encoding="utf-8").split() if file.exists() else []
        everyone = sorted({*known, *bad})
        if self.is_head:
            replace_file(file, "".join(f"{name}\n" for name in everyone))
        return everyone

    def _failure(self) -> str:
        """Return in a few words how this node's launcher has failed."""
        if memory_kills.kills():
            return f"{self.name} {OUT_OF_MEMORY} (raise memory_per_node in the cluster file)"
        return f"{self.name} crashed"

    def _judge(
        self,
        run: RunDir,
        ended: Ended,
        verdict_before: Verdict | None,
        *,
        told: str | None,
        failure: str | None,
    ) -> Decision:
        if run.is_finished:
            return Decision("done", exit_code=EXIT_DONE)
        verdict = run.verdict()
        if verdict is not None and verdict != verdict_before:
            return Decision("stop", verdict.error, verdict.exit_code)
        if told is not None:
            return Decision("stop", told, EXIT_USER_ERROR)
        if ended.signal_name is not None and self.is_head:
            end_for(run.attempts, "interrupted", signal=ended.signal_name)
        if (run.path / "slurm" / "cancelled").exists():
            return Decision("stop", "cancelled by its user", EXIT_INTERRUPTED)
        step = run.newest_step()
        interrupted = failure is None or run.was_interrupted
        reason = (
            f"stopped by {ended.signal_name or 'a signal'} after step {step}"
            if interrupted
            else f"{failure}; goes on after step {step}"
        )
        code = EXIT_INTERRUPTED if interrupted else EXIT_CRASHED
        return self._within_limits(Decision("again", reason, code))

    def _within_limits(self, decision: Decision) -> Decision:
        """Return a decision to start again, or one to stop where there were too many starts."""
        if not decision.word.startswith("again"):
            return decision
        limits = Limits(self.options.max_starts, self.options.max_starts_without_progress)
        problem = too_many_starts(self.run, limits, decision.reason)
        if problem is None:
            return decision
        return Decision("stop", f"{problem}; last: {decision.reason}", EXIT_DO_NOT_RETRY)


def too_many_starts(run: RunDir, limits: Limits, reason: str) -> str | None:
    """Return in one line why a run is not started once more, or None where it is.

    Starts before a person last submitted the run do not count.

    Args:
        run: The run.
        limits: What the cluster file allows.
        reason: Why the present start has ended.
    """
    ends: list[tuple[int, str]] = []
    starts = 0
    for event in history.events(run.path):
        if event["event"] == "submitted":
            ends, starts = [], 0
        elif event["event"] == "started":
            starts += 1
        elif event["event"] == "decided":
            ends.append((event["step"], event["reason"]))
    ends.append((run.newest_step(), reason))
    if starts >= limits.starts:
        return f"{limits.starts} starts are all that the cluster file's requeue.max_starts allows"
    out_of_memory_at = [step for step, told in ends[-2:] if OUT_OF_MEMORY in told]
    if len(out_of_memory_at) == 2 and len(set(out_of_memory_at)) == 1:
        return f"out of memory twice after step {out_of_memory_at[0]}"
    steps = [step for step, _ in ends[-limits.without_progress :]]
    if len(steps) == limits.without_progress and len(set(steps)) == 1:
        return (
            f"no progress in {limits.without_progress} starts: each ended at step {steps[0]}"
            " (is the time limit too short?)"
        )
    return None


def _watch(run: RunDir) -> None:
    """Have this process save while there is still time, and when its user has cancelled the run.

    Slurm's own signals reach only a step that has begun, and know nothing of how long a save takes.
    """
    end_s = float(os.environ["PEFT_DIST_JOB_END"])
    limit_s = end_s - time.time()
    save_at_s = read_again_s = 0.0
    while not (run.path / "slurm" / "cancelled").exists():
        now = time.time()
        if now >= read_again_s:  # a long ledger takes a while to read
            save_at_s = end_s - min(lead_s(run.ledger, least_s=0), limit_s / 2)
            read_again_s = now + (save_at_s - now) / 20
        if now >= save_at_s:
            break
        time.sleep(LOOK_EVERY_S)
    newest = latest(run.attempts) or {}
    has_ended = "outcome" in newest and process_identity.slurm_job().items() <= newest.items()
    if not has_ended:
        os.kill(os.getpid(), signal.SIGUSR1)


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError:
            return False
        return True


if __name__ == "__main__":
    sys.exit(main())
