"""Run one node's part of a job: check the node, run its launcher, report how that ended.

`node.sh` starts it on every node. On the first one, the head, it asks `restart_policy` what comes
of the run and leaves the answer beside the logs of this start, where the batch script reads it.
Where the head left none, or Slurm knows more, the batch script runs it once more, with `--after`.
"""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peft_dist.common import env, process_identity
from peft_dist.common.atomic import replace_file
from peft_dist.common.console import say
from peft_dist.common.errors import ERROR_PREFIX, EXIT_DONE, PeftDistError, SlurmError
from peft_dist.common.job_end import job_end_s
from peft_dist.common.sharing import set_run_umask
from peft_dist.launch.launcher_process import PASSED_ON, run_launcher
from peft_dist.preflight.verdict import PORT_TAKEN, Report
from peft_dist.run import job_events
from peft_dist.run.attempt_records import latest
from peft_dist.run.directory import RunDir
from peft_dist.run.environment import changes_since_submit
from peft_dist.run.history import (
    LaunchMark,
    ending_of_launch,
    is_superseded,
    mark_launch,
    read_history,
)
from peft_dist.run.lease import end_for
from peft_dist.run.restart_policy import STOPS, Decision, Ending, Kind, RestartLimits, decide
from peft_dist.slurm import memory_kills
from peft_dist.slurm.excluded_nodes import exclude
from peft_dist.slurm.failed_nodes import FailedNodes
from peft_dist.slurm.interfaces import interface_variables, is_free
from peft_dist.slurm.look_back import ending_of_start
from peft_dist.slurm.notice import notify
from peft_dist.slurm.old_logs import pack_old_logs
from peft_dist.slurm.own_gpu import own_gpu
from peft_dist.slurm.save_lead import lead_s
from peft_dist.slurm.secrets import read_secrets
from peft_dist.slurm.supervisor_options import parser

DECISION_WAIT_S = 60.0
"""How long other nodes wait for the head's decision before they end on their own."""
LAST_WORD_S = 30.0
"""Seconds before the time limit at which it is decided what comes of a run that does not end."""
LOOK_EVERY_S = 5.0
"""Seconds between two looks at how much time is left, and whether the run is cancelled."""


def main(argv: Sequence[str] | None = None, kind: "type[Node] | None" = None) -> int:
    """Run this node's share of a job; return its exit code.

    Args:
        argv: The arguments.
        kind: What works on the node. Default: `Node`, which trains.
    """
    own, launcher = _split(list(sys.argv[1:] if argv is None else argv))
    options = parser().parse_args(own)
    set_run_umask()
    node = (kind or Node)(options, launcher)
    try:
        ending = node.work() if options.after is None else node.look_back()
    except PeftDistError as error:
        say(f"{ERROR_PREFIX}{error}", sys.stderr)
        ending = Ending(Kind.USER_ERROR, str(error))
    return EXIT_DONE if ending is None else node.finish(ending)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    index = words.index("--")
    return words[:index], words[index + 1 :]


class Node:
    """This node, in this start of the job."""

    def __init__(self, options: argparse.Namespace, launcher: Sequence[str]) -> None:
        """Read what the batch script exported."""
        self.options = options
        self.launcher = list(launcher)
        self.run = RunDir(options.run_dir)
        self.index = int(os.environ["SLURM_NODEID"])
        self.hosts = os.environ[env.HOSTS].split(",")
        self.port = int(os.environ[env.PORT])
        self.name = os.environ.get("SLURMD_NODENAME", self.hosts[self.index])
        self.log = Path(os.environ[env.LOGS]) / f"{self.name}.log"
        self.decision_file = self.log.with_name("decision")
        self.signals: list[str] = []
        """What came while no launcher ran; it would have ended this process."""
        for number in PASSED_ON:
            signal.signal(number, lambda got, _: self.signals.append(signal.Signals(got).name))
        nonce = os.environ[env.NONCE]
        self.failed_nodes = FailedNodes(
            self.log.parent, name=self.name, nonce=nonce, looks=self.is_head
        )

    @property
    def is_head(self) -> bool:
        """Whether this node decides."""
        return self.index == 0

    @property
    def cancelled(self) -> Path:
        """The file by which `peft-dist cancel` ends the run, and what is queued of it."""
        return self.run.path / "slurm" / "cancelled"

    def work(self) -> Ending:
        """Check the node and train; return how that ended, as far as this node knows."""
        run = RunDir.open(self.options.run_dir)
        if self.hosts[self.index] != self.name:
            raise SlurmError(
                f"node {self.index} of the step is {self.name}, and {self.hosts[self.index]} in "
                "the list of the job's nodes",
                where="srun",
                remedy="remove what orders nodes from srun: in the cluster file",
            )
        if run.is_finished:
            return Ending(Kind.DONE)
        if self.cancelled.exists():
            return Ending(Kind.CANCELLED)
        stopped = self._stopped_before()
        if stopped is not None:
            return Ending(Kind.USER_ERROR, stopped)
        if self.options.interface is not None:
            os.environ.update(interface_variables(self.options.interface, os.environ[env.HEAD]))
        before = mark_launch(run)
        if self.is_head and len(self.hosts) > 1 and not is_free(self.port):
            return self._port_taken(self.port)
        changed = changes_since_submit(run.path) if self.is_head else ""
        if changed and self.options.frozen:
            return Ending(Kind.USER_ERROR, f"{changed}; `peft-dist resume` accepts that")
        if changed:
            say(f"peft-dist: warning: {changed}", sys.stderr)
        if not self.options.no_preflight:
            failed = self._preflight(run)
            if failed is not None:
                return failed
        if self.signals:
            return Ending(Kind.INTERRUPTED, f"stopped by {self.signals[0]}", self.signals[0])
        if self.is_head:
            exclude(run.path, [])
            pack_old_logs(run.logs)
            threading.Thread(target=self._watch, args=(run,), daemon=True).start()
        if self.options.per_rank:
            replace_file(self.ready, "")
        return self.train(run, before)

    @property
    def ready(self) -> Path:
        """What the first task of a node leaves when those of its other ranks may begin."""
        return self.log.with_suffix(f".{os.environ[env.NONCE]}.ready")

    def train(self, run: RunDir, before: LaunchMark) -> Ending:
        """Run the launcher to its end; return how that was."""
        environment = {
            env.LAUNCHED_AT: repr(time.time()),
            env.RANK_LOGS: str(self.log.with_suffix("")),
            **({} if self.options.secrets is None else read_secrets(self.options.secrets)),
            **(own_gpu(os.environ) if self.options.per_rank else {}),
        }
        ended = run_launcher(
            self.launcher,
            environment=environment,
            error_log=None,
            is_lost=self.failed_nodes.have_one,
        )
        # A launcher ends with 0 also where a signal has ended its processes.
        otherwise = Ending(Kind.INTERRUPTED, "stopped by a signal")
        if ended.signal_name is None and ended.code != EXIT_DONE:
            otherwise = self.failed_nodes.ending or self.failure()
            self.failed_nodes.add_own(otherwise)
        if ended.signal_name is not None and self.is_head and not run.is_finished:
            end_for(run.attempts, "interrupted", signal=ended.signal_name)
        ending = ending_of_launch(
            run,
            before=before,
            signal=ended.signal_name,
            failure=ended.failure,
            otherwise=otherwise,
        )
        if self.cancelled.exists() and ending.kind not in (Kind.DONE, *STOPS):
            return Ending(Kind.CANCELLED)
        return ending

    def look_back(self) -> Ending | None:
        """Return how a start ended whose head left no decision, or that Slurm may have cancelled.

        None where the decision that is there stands.
        """
        if self.run.is_finished:
            return Ending(Kind.DONE)
        if self.cancelled.exists():
            return Ending(Kind.CANCELLED)
        logs = self.log.parent
        ending = ending_of_start(
            logs,
            nonce=os.environ[env.NONCE],
            hosts=self.hosts,
            srun_code=self.options.after,
            job_end_s=job_end_s(),
        )
        if ending.kind is Kind.NODES_UNFIT:
            ending = replace(ending, nodes=tuple(exclude(self.run.path, ending.nodes)))
        is_decided = self.decision_file.exists()
        return None if is_decided and ending.kind is not Kind.CANCELLED else ending

    def finish(self, ending: Ending) -> int:
        """Leave the head's decision for all; return this node's exit code."""
        if self.is_head and is_superseded(self.run.attempts):
            ending = Ending(Kind.SUPERSEDED)
        limits = RestartLimits.of_job(
            starts=self.options.max_starts,
            without_progress=self.options.max_starts_without_progress,
        )
        ending = replace(ending, checkpoint=self.run.newest_step())
        decision = decide(read_history(self.run), ending, limits)
        if self.is_head:
            if decision.word not in ("superseded", "port-taken"):
                job_events.record(self.run.path, _event(decision, ending))
            replace_file(self.decision_file, f"{decision}\n")
            say(f"peft-dist: {decision}")
            job = job_events.this_job()
            notify(self.run.path, job, ending, decision, self.options.secrets)
            return decision.exit_code
        # Whoever ends first with another code than 0 has srun kill the others, the head among them.
        deadline = time.monotonic() + DECISION_WAIT_S
        while not self.decision_file.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        return EXIT_DONE if self.decision_file.exists() else decision.exit_code

    def _stopped_before(self) -> str | None:
        """Return why no job goes on for the one before it, where that one has ended the run."""
        if env.AFTER_JOB not in os.environ:
            return None
        decided = ""
        for event in job_events.events(self.run.path):
            if event["event"] == "submitted":
                decided = ""
            elif event["event"] == "decided":
                decided = str(event.get("reason", "")) if event["decision"] == "stop" else ""
        return f"an earlier job has ended the run: {decided}" if decided else None

    def _port_taken(self, port: int) -> Ending:
        tries = int(os.environ.get(env.TRY, "1"))
        return Ending(Kind.PORT_TAKEN, f"{port} on {self.hosts[0]}", tries=tries)

    def _preflight(self, run: RunDir) -> Ending | None:
        """Return why the run cannot start on these nodes, where it cannot."""
        options = self.options
        command = [
            *(sys.executable, "-m", "peft_dist.preflight.main", "--run-dir", str(run.path)),
            *("--hosts", ",".join(self.hosts), "--index", str(self.index), "--host", self.name),
            *("--head", os.environ.get(env.HEAD, self.hosts[0])),
            *("--port", str(self.port + 1), "--devices", str(options.devices)),
            *("--timeout-s", str(options.preflight_timeout_s)),
            *("--arrival-s", str(options.arrival_s)),
            *("--min-free-gb", str(options.min_free_gb)),
            *("--max-clock-offset-s", str(options.max_clock_offset_s)),
        ]
        ended = run_launcher(command, environment={}, error_log=None)
        if ended.signal_name is not None:
            return Ending(
                Kind.INTERRUPTED, f"stopped by {ended.signal_name}", signal=ended.signal_name
            )
        if ended.code == EXIT_DONE:
            return None
        if ended.code == PORT_TAKEN:
            return self._port_taken(self.port + 1)
        report = Report.read(run.path)
        if report is not None and report.common is not None:
            return Ending(Kind.ALL_NODES_UNFIT, f"pre-flight: {report.common}")
        if report is None or report.ok:
            return Ending(Kind.PREFLIGHT_INCOMPLETE, "the pre-flight ended without a report")
        by_node = dict(line.split(": ", 1) for line in report.lines)
        name = (report.bad or report.late)[0]
        why = f"pre-flight: {name}: {by_node[name]}"
        if not report.bad:
            return Ending(Kind.NODES_LATE, why)
        nodes = tuple(exclude(run.path, report.bad, write=self.is_head))
        return Ending(Kind.NODES_UNFIT, why, nodes=nodes)

    def _watch(self, run: RunDir) -> None:
        """Have this process save while there is time, and when its user has cancelled the run.

        Slurm's own signals reach only a step that has begun, and know nothing of how long a save
        takes. Where even that does not end the processes, decide while there is time for it.
        """
        began_s = time.time()
        save_at_s = read_again_s = 0.0
        while not self.cancelled.exists():
            now = time.time()
            if now >= min(save_at_s, read_again_s):  # a long ledger takes a while to read
                end_s = job_end_s()
                save_at_s = end_s - min(lead_s(run.ledger, least_s=0), (end_s - began_s) / 2)
                read_again_s = now + (save_at_s - now) / 20
                if now >= save_at_s:
                    break
            time.sleep(LOOK_EVERY_S)
        newest = latest(run.attempts) or {}
        if "outcome" in newest and process_identity.slurm_job().items() <= newest.items():
            return
        os.kill(os.getpid(), signal.SIGUSR1)
        while (left_s := job_end_s() - time.time()) > min(LAST_WORD_S, left_s / 4 + LOOK_EVERY_S):
            time.sleep(LOOK_EVERY_S)
        self.finish(Ending(Kind.INTERRUPTED, "its processes had not ended at the time limit"))

    def failure(self) -> Ending:
        """Return how this node's launcher has failed."""
        if memory_kills.kills():
            return Ending(
                Kind.OUT_OF_MEMORY,
                f"{self.name} ran out of the memory it had asked for"
                " (raise memory_per_node in the cluster file)",
            )
        return Ending(Kind.CRASHED, f"{self.name} crashed")


def _event(decision: Decision, ending: Ending) -> job_events.Event:
    """Return what the run's history says of a decision."""
    return {
        "event": "decided",
        "job": job_events.this_job(),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "time": int(time.time()),
        "step": ending.checkpoint,
        "decision": decision.word,
        "reason": str(decision).partition(" ")[2],
        "kind": ending.kind,
        "error": ending.error,
    }


if __name__ == "__main__":
    sys.exit(main())
