"""One attempt to train a run, on one rank: what guards it, what follows it, and how it ends."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft_dist.common.env import LAUNCHED_AT
from peft_dist.common.errors import Interrupted, LaunchError, PeftDistError, Superseded
from peft_dist.common.logs import NOTICE
from peft_dist.common.process_identity import launcher, slurm_job
from peft_dist.common.table import print_lines, stdout_form
from peft_dist.config import Recipe
from peft_dist.distributed import flight_recorder
from peft_dist.distributed.collectives import broadcast_object, gather_objects
from peft_dist.distributed.world import read_world
from peft_dist.ledger.events import EndEvent, StartEvent
from peft_dist.ledger.gap import read_gap
from peft_dist.ledger.writer import LedgerWriter, Tracker
from peft_dist.metrics.memory import peak_device_bytes, peak_rss_bytes
from peft_dist.metrics.result import make_result, summary
from peft_dist.run.directory import RunDir, write_text_atomic
from peft_dist.run.lease import Attempt
from peft_dist.run.prediction import planned_facts
from peft_dist.run.provenance import versions
from peft_dist.run.restart_policy import Kind
from peft_dist.tracking.memory_file import warn_of_other_processes, watch_memory
from peft_dist.tracking.nodes import watch_machine
from peft_dist.tracking.profiler import StepProfiler
from peft_dist.tracking.terminal import Terminal
from peft_dist.tracking.wandb.tracker import WandbTracker
from peft_dist.trainer import Trainer
from peft_dist.worker.process import WorkerContext
from peft_dist.worker.signals import StopRequests
from peft_dist.worker.watchdog import HangWatchdog, WatchdogLimits

log = logging.getLogger(__name__)


class TrainingAttempt:
    """This rank's part in an attempt: lease, watchdog, clocks, ledger, trackers, result.

    It is the hooks of its trainer.

    Attributes:
        world: The processes that train together.
    """

    def __init__(
        self,
        recipe: Recipe,
        context: WorkerContext,
        stop_requests: StopRequests,
        *,
        logs: Path,
        started_s: float,
    ) -> None:
        """Begin to watch for hangs.

        Args:
            recipe: What is trained.
            context: This process; on rank 0 with the run and its lease.
            stop_requests: The signals it got.
            logs: The run's folder of logs.
            started_s: When the process was started, on the monotonic clock.

        Raises:
            LaunchError: Where the launcher's variables make no sense, or a tracker is missing.
        """
        self._recipe, self._context, self._requests = recipe, context, stop_requests
        self._started_s = started_s
        self._startup_s = time.monotonic() - started_s
        self._load_s = self._train_s = 0.0
        self._phase = ""
        self._peaks: list[Any] = []
        self._summary: list[str] = []
        self._ledger: LedgerWriter | None = None
        """On rank 0, from when it begins to train."""
        self.world = read_world()
        _require_trackers(recipe)
        self._logs = logs
        self._profiler = StepProfiler(
            recipe.profile, rank=self.world.rank, device=self.world.device
        )
        limits = recipe.watchdog
        flight_recorder.export_recorder(os.environ)
        self._watchdog = HangWatchdog(
            rank=self.world.rank,
            folder=logs,
            limits=WatchdogLimits(limits.min_s, limits.setup_s, limits.evaluation_s, limits.save_s),
            world_size=self.world.size,
            on_hang=lambda line: context.note_crash(Kind.HUNG, line),
            collectives=flight_recorder.dump,
        )

    @property
    def number(self) -> int:
        """Which attempt this is, from 1."""
        return self._context.attempt_number

    @property
    def run(self) -> RunDir:
        """The run directory, once `share_run` was called."""
        assert self._context.run_dir is not None
        return self._context.run_dir

    @property
    def lease(self) -> Attempt:
        """The lease of the run; on rank 0 alone."""
        assert self._context.attempt is not None, "rank 0 alone holds the run"
        return self._context.attempt

    def share_run(self) -> None:
        """Broadcast which attempt of which run this is. Collective."""
        context = self._context
        path = "" if context.run_dir is None else str(context.run_dir.path)
        path, context.attempt_number = broadcast_object([path, context.attempt_number])
        context.run_dir, context.has_met = RunDir.open(path), True
        self._watchdog.attempt = context.attempt_number
        watch_memory(context, self.world.device, folder=self._logs)
        warn_of_other_processes(self.world)

    def require_lease(self) -> None:
        """Look whether the run is still ours, on rank 0, before anything of it is replaced.

        Raises:
            Superseded: Where a later attempt has taken it over.
            OSError: Where its folder cannot be looked at.
        """
        self.lease.check(now=True)

    def sync_ledger(self) -> None:
        """Make what the ledger holds survive a power cut; only rank 0 has one.

        Raises:
            OSError: Where the disk is full or broken.
            Superseded: Where a later attempt has taken the run over.
        """
        if self._ledger is not None:
            self._ledger.sync()

    def stop_requested(self) -> bool:
        """Whether this process was sent a signal."""
        return self._requests.requested is not None

    def phase(self, name: str, step: int) -> None:
        """Note a phase for the watchdog and for a crash report; check that the run is still ours.

        Raises:
            Superseded: Where a later attempt has taken it over.
        """
        self._context.step, self._phase = step, name
        self._profiler.phase(name, step, into=self.run.profile, attempt=self.number)
        if self._context.attempt is not None:
            self._context.attempt.check()
        self._watchdog.phase(name, step)

    @contextmanager
    def follow(self, trainer: Trainer) -> Iterator[None]:
        """Write ledger and trackers while the block trains, and how it ended. Collective."""
        world = self.world
        hosts = gather_objects(os.uname().nodename)
        self._load_s = time.monotonic() - self._started_s - self._startup_s
        write = None
        if world.is_main:
            ledger = self._ledger = LedgerWriter(
                self.run.ledger,
                attempt=self.number,
                clock_zero=self._started_s,
                check=self.lease.check,
            )
            trainer.trackers = _trackers(ledger, self.run, trainer)
            self._report_start(trainer, hosts)
            write = ledger.write
        sampler = watch_machine(
            self._recipe.tracking,
            self.run,
            write,
            rank=world.rank,
            local_rank=world.local_rank,
            attempt=self.number,
            step=lambda: trainer.progress.step,
            gpu_uuids=world.gpu_uuids(),
        )
        if world.is_main:
            self._requests.on_request = self._say_stop
        self._requests.begin_training()
        outcome = "crashed"
        try:
            yield
            outcome = "done"
        except Superseded:
            trainer.trackers = []  # the ledger is another's now
            raise
        except PeftDistError as error:
            outcome = "interrupted" if isinstance(error, Interrupted) else "failed"
            raise
        finally:
            step = trainer.progress.step
            self._watchdog.phase("save", step)
            self._profiler.end(step, into=self.run.profile, attempt=self.number)
            if sampler is not None:
                sampler.stop()
            _end(trainer, outcome)
            self._watchdog.stop()

    def _say_stop(self, signal_name: str) -> None:
        """Say at once what comes of a signal: the step that is under way can take minutes."""
        by = "" if signal_name == "SIGINT" else f"{signal_name}: "
        again = ""
        if signal_name == "SIGINT" and launcher() is not None:
            again = "; Ctrl-C again stops without saving"
        log.log(NOTICE, "%s%s", by, stop_notice(self._phase, self._context.step or 0, again))

    def end_training(self, step: int) -> None:
        """Note that the last step is done, and that the adapter is saved next."""
        self.phase("save", step)
        self._phase = "end"
        self._train_s = time.monotonic() - self._started_s - self._startup_s - self._load_s

    def measure_peaks(self) -> None:
        """Gather the peak memory of all ranks, in bytes of host and device. Collective."""
        self._peaks = gather_objects((peak_rss_bytes(), peak_device_bytes(self.world.device)))

    def write_result(self, trainer: Trainer) -> None:
        """Write the result on rank 0, and let go of the run."""
        if not self.world.is_main:
            return
        result = make_result(
            trainer.setup,
            trainer.progress,
            load_seconds=self._load_s + self._startup_s,
            train_seconds=self._train_s,
            peaks=self._peaks,
            rows=trainer.rows.sources,
            held_out=() if trainer.eval_set is None else trainer.eval_set.rows.sources,
        )
        self.require_lease()
        write_text_atomic(self.run.result, json.dumps(result, indent=2) + "\n")
        self.lease.end("done", step=trainer.progress.step)
        width, colour = stdout_form()
        self._summary = summary(
            result, self.run, base=trainer.setup.released.name, width=width, colour=colour
        )

    def show_result(self) -> None:
        """Print the result on rank 0, once nothing is left to wait for."""
        with suppress(OSError):  # a stream that is full or gone
            print_lines(self._summary)

    def _report_start(self, trainer: Trainer, hosts: list[str]) -> None:
        """Write into lease and ledger, and print, where this attempt begins."""
        step, steps, setup = trainer.progress.step, trainer.plan.total_steps, trainer.setup
        gap = read_gap(self.run.ledger, step)
        lost = {} if gap is None else {"ledger_gap": [gap.from_step, gap.to_step]}
        self.lease.note(from_step=step, steps=steps, world_size=self.world.size, **lost)
        begun = f"going on after step {step} (attempt {self.number})" if step else "training"
        shape = f"{steps} steps, {trainer.rows.n_rows:,} rows"
        log.info("%s: %s, on %s", begun, shape, self.world.device_name)
        facts: dict[str, Any] = {}
        job = slurm_job()
        if job["slurm_job_id"] is not None:
            facts |= job
        facts |= planned_facts(self.run)
        if LAUNCHED_AT in os.environ:
            facts["launched"] = float(os.environ[LAUNCHED_AT])
        trainer.write(
            StartEvent(
                step=step,
                steps=steps,
                world_size=self.world.size,
                strategy=setup.strategy,
                device=self.world.device_name,
                base_parameters=setup.base_parameters,
                base_bytes_per_rank=setup.base_bytes_by_rank,
                trained_turns=trainer.rows.trained_turns,
                stop_tokens=trainer.rows.stop_tokens,
                versions=versions(),
                startup_s=self._startup_s,
                load_s=self._load_s,
                hosts=hosts,
                **facts,
            )
        )
        if gap is not None:
            trainer.write(gap)


def stop_notice(phase: str, step: int, again: str) -> str:
    """Return what a run does that is asked to stop, by what it is doing.

    Args:
        phase: As `TrainingAttempt.phase` was told, or "end" after the last step.
        step: The step it is at.
        again: What another signal would do, where it does anything.
    """
    match phase:
        case "evaluation" if step == 0:
            return "leaving the evaluation; no step is trained yet, so there is nothing to save"
        case "evaluation":
            return f"leaving the evaluation, then saving step {step}{again}"
        case "save":
            return f"step {step} is being saved; the run ends when that is done"
        case "end":
            return "the last step is done; the adapter is saved, and the run ends"
    return f"finishing step {max(step, 1)}, then saving{again}"


def _end(trainer: Trainer, outcome: str) -> None:
    """Write how the attempt ended and close every tracker, whatever one of them raises.

    A checkpoint that is being written is not given up, whatever else has failed.
    """
    with ExitStack() as closing:
        for tracker in trainer.trackers:
            closing.callback(tracker.close)
        trainer.finish_saves()
        trainer.write(EndEvent(step=trainer.progress.step, outcome=outcome))


def _require_trackers(recipe: Recipe) -> None:
    """Refuse a tracker that is not installed, on every process and before anything is loaded."""
    if recipe.tracking.wandb.mode != "disabled" and find_spec("wandb") is None:
        raise LaunchError(
            "wandb is not installed",
            where="tracking.wandb.mode",
            remedy="pip install 'peft-dist[wandb]', or mode: disabled",
        )


def _trackers(ledger: LedgerWriter, run: RunDir, trainer: Trainer) -> list[Tracker]:
    """Return what gets each event of a run, in this order; closed in the other."""
    trackers: list[Tracker] = [ledger]
    wandb = trainer.recipe.tracking.wandb
    if wandb.mode != "disabled":
        trackers.append(WandbTracker(run, wait_s=wandb.wait_s))
    terminal = Terminal(trainer.plan.total_steps, first_step=trainer.progress.step)
    return [*trackers, terminal]
