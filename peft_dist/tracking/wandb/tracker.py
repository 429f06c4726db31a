"""Start and end the process that sends a run's ledger to Weights & Biases.

Training imports no wandb. Whatever becomes of that process, training goes on, and its exit code is
its own; what W&B lacks afterwards, `peft-dist sync` sends.
"""

import logging
import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress

from peft_dist.common.console import say
from peft_dist.ledger.events import LedgerEvent
from peft_dist.run.directory import RunDir
from peft_dist.tracking.wandb.identity import known_url
from peft_dist.tracking.wandb.sidecar import EXIT_OFFLINE, EXIT_SENT

log = logging.getLogger(__name__)

LATE_S = 10.0
"""Seconds by which the process that sends may be gone later than it should, on a busy machine."""
KILLED_S = 1.0
"""How long a killed process may take to go."""


class WandbTracker:
    """A tracker that leaves the events to a process of its own."""

    def __init__(self, run: RunDir, *, wait_s: float) -> None:
        """Prepare; the process is started with the first event, which the ledger then has.

        Args:
            run: Whose ledger is sent.
            wait_s: Seconds after the end of training at which that process is gone, whatever W&B
                does.
        """
        self._run, self._wait_s = run, wait_s
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = False

    def write(self, event: LedgerEvent) -> None:
        """Take no event; all of them are in the ledger."""
        if not self._begun:
            self._begun = True
            self._begin()

    def close(self) -> None:
        """End the input of the process, and wait for it at most `wait_s` and `LATE_S`."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            code = process.wait(timeout=self._wait_s + LATE_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # one in a dead file system never goes
                process.wait(timeout=KILLED_S)
            code = -signal.SIGKILL
        say(_summary(self._run, code))

    def _begin(self) -> None:
        # Safe path: a folder `wandb/` in the current one would else be taken for the library. The
        # command line names the run directory alone; the key, if any, is in the environment.
        command = [
            sys.executable,
            "-P",
            "-m",
            "peft_dist.tracking.wandb.sidecar",
            str(self._wait_s),
            str(self._run.path),
        ]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                cwd=self._run.path,
                start_new_session=True,
            )
        except OSError as error:
            log.warning("W&B is off: its process cannot be started: %s", error.strerror or error)


def _summary(run: RunDir, code: int) -> str:
    sync = f"`peft-dist sync {shlex.quote(str(run.path))}`"
    if code == EXIT_SENT:
        return f"W&B: {known_url(run)}; {sync} adds the adapter"
    if code == EXIT_OFFLINE:
        return f"W&B: offline; {sync} sends the run"
    return f"W&B lacks rows of this run; {sync} sends them"
