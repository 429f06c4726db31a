"""Trace some steps of a run with torch's profiler, into a file that Perfetto and Chrome open.

It follows the phases that a trainer reports: the trainer itself knows nothing of it.
"""

import gzip
import logging
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from peft_dist.config.run_sections import Profile

log = logging.getLogger(__name__)


class StepProfiler:
    """Traces the steps of one rank that a recipe names; nothing where it names none."""

    def __init__(self, settings: Profile, *, rank: int, device: torch.device) -> None:
        """Prepare; nothing is traced yet.

        Args:
            settings: Steps and ranks.
            rank: Of this process.
            device: What it computes on; kernels are traced on a GPU alone.
        """
        self._steps = settings.steps if rank in settings.ranks else None
        self._rank, self._device = rank, device
        self._first = 0
        self._running: Any = None

    def phase(self, name: str, step: int, *, into: Path, attempt: int) -> None:
        """Take note of what begins now; start before the first of the steps, write after the last.

        Args:
            name: The phase.
            step: The step it belongs to.
            into: The folder for traces, made where it is missing.
            attempt: Its number is in the file's name.
        """
        if self._steps is None:
            return
        first, last = self._steps
        within = first <= step <= last
        if self._running is not None and (step > last or (step == last and name != "step")):
            self._write(last, into, attempt)
        elif name == "step" and within and self._running is None:
            self._first = step
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(activities=activities, acc_events=True)
            self._running.start()
        elif name == "step" and within:
            self._running.step()

    def end(self, step: int, *, into: Path, attempt: int) -> None:
        """Write what was traced, where training ends before the last of the steps.

        Args:
            step: The last that was done.
            into: As in `phase`.
            attempt: As in `phase`.
        """
        if self._running is not None:
            self._write(step, into, attempt)

    def _write(self, last: int, into: Path, attempt: int) -> None:
        """Stop, which waits for the device, and write; a full disk does not end the training."""
        running, self._running, self._steps = self._running, None, None
        running.stop()
        name = f"steps-{self._first}-{last}-a{attempt}-rank-{self._rank}.json.gz"
        try:
            into.mkdir(exist_ok=True)
            with TemporaryDirectory(dir=into, prefix=".") as folder:
                plain, packed = Path(folder, "trace.json"), Path(folder, name)
                running.export_chrome_trace(str(plain))
                with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=4) as target:
                    shutil.copyfileobj(source, target)
                packed.replace(into / name)
        except OSError as error:
            log.warning("the trace of steps %d to %d is lost: %s", self._first, last, error)
            return
        log.info("traced steps %d to %d: %s", self._first, last, into / name)
