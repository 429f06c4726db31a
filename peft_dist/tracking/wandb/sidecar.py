"""Send the ledger to W&B from a process beside training: `python -m ... RUN_DIR`.

It reads what rank 0 writes, and no step waits for it. It ends when its standard input does, which
is when rank 0 closes it or is gone, however that came about.
"""

import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress

from peft_dist.common import logs
from peft_dist.common.errors import PeftDistError
from peft_dist.common.sharing import set_run_umask
from peft_dist.ledger.events import EndEvent
from peft_dist.ledger.reader import LedgerReader
from peft_dist.run.directory import RunDir
from peft_dist.tracking.wandb.alerts import ALERT_EVERY_S, Alert, alert_of, crashed
from peft_dist.tracking.wandb.identity import only_writer, prove_room, reachable, wandb_environment
from peft_dist.tracking.wandb.rows import LedgerRows, rows_of
from peft_dist.tracking.wandb.wandb_run import NotAllowed, Unreachable, WandbRun, recipe_of

log = logging.getLogger(__name__)

BESIDE_UPLOADS_S = 2.5
"""Of the time that it has after the end of training, what is not for uploads."""
LOOK_EVERY_S = 1.0
"""Seconds between two reads of the ledger."""
TRY_AGAIN_S = 120.0
"""Seconds between two tries of a server that did not answer."""
PREDECESSOR_S = 10.0
"""How long the process of the attempt before may still be sending."""
NICENESS = 10

EXIT_SENT, EXIT_OFFLINE, EXIT_INCOMPLETE = 0, 4, 5
"""The server has every row; none was to be sent; it lacks some."""


def main(argv: list[str]) -> int:
    """Follow a run until its attempt is over; return whether its rows were sent.

    Args:
        argv: The seconds after the end of training at which this process is gone, whatever W&B
            does, and the run directory.
    """
    leave_after_s, folder = float(argv[0]), argv[1]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # training ends in its own time, and so do we
    with suppress(OSError):
        os.nice(NICENESS)
    set_run_umask()
    environment = wandb_environment(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    logs.begin(on_screen=False)
    over = threading.Event()
    threading.Thread(target=_wait_for_end, args=(over, leave_after_s), daemon=True).start()
    try:
        return Sidecar(RunDir.open(folder), over, leave_after_s).follow()
    except Exception as error:  # of whatever kind: it ends this process and nothing else
        log.warning("W&B gets no more rows: %s", error)
        return EXIT_INCOMPLETE


def _wait_for_end(over: threading.Event, leave_after_s: float) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    over.set()
    time.sleep(leave_after_s)
    log.warning("W&B did not take the last rows within %.0f s", leave_after_s)
    os._exit(EXIT_INCOMPLETE)


class Sidecar:
    """Sends the rows of one run while it trains, to the server or into a file."""

    def __init__(self, run: RunDir, over: threading.Event, leave_after_s: float) -> None:
        """Prepare; `over` is set once no more records will come."""
        self._run, self._over = run, over
        self._uploads_s = leave_after_s - BESIDE_UPLOADS_S
        self._settings = recipe_of(run).tracking.wandb
        self._rows = LedgerRows(run.ledger)
        newest = LedgerReader(run.ledger).newest_start()
        if newest is None:
            raise PeftDistError("has not begun to train", where=str(run.path))
        self._start, self._last = newest
        self._attempt = self._start.attempt
        self._may_go_online = self._settings.mode != "offline"
        self._alerted: set[int] = set()
        """Rows whose alert was sent."""

    def follow(self) -> int:
        """Send rows until the attempt is over; return one of the exit codes."""
        with only_writer(self._run, PREDECESSOR_S):
            wandb_run = self._open()
            next_try = time.monotonic() + TRY_AGAIN_S
            while not self._over.wait(LOOK_EVERY_S):
                try:
                    self._send(wandb_run)
                except Unreachable as error:
                    log.warning("W&B's process is gone (%s); it is started again", error)
                    wandb_run.abandon()
                    wandb_run = self._open()
                late = time.monotonic() > next_try
                if late and not wandb_run.is_online and self._may_go_online:
                    next_try = time.monotonic() + TRY_AGAIN_S
                    if reachable():
                        wandb_run.finish(None, 0)
                        wandb_run = self._open()
            return self._end(wandb_run)

    def _open(self) -> WandbRun:
        """Begin at the server, where that can be, else in a file."""
        written = self._rows.count
        if self._may_go_online:
            try:
                wandb_run = WandbRun(
                    self._run, self._start, online=True, finish_timeout_s=self._uploads_s
                )
                self._rows = LedgerRows(self._run.ledger)
                return wandb_run
            except Unreachable as error:
                log.warning("W&B does not answer (%s); logging offline", error)
            except NotAllowed as error:
                self._may_go_online = False
                # No key and `auto` is how one asks for this.
                if self._settings.mode != "auto" or "no key" not in str(error):
                    log.warning("%s; logging offline", error)
        events = LedgerReader(self._run.ledger).follow()
        earlier = sum(rows_of(event) for event in events if event.attempt < self._attempt)
        return WandbRun(self._run, self._start, online=False, first_row=max(written, earlier))

    def _send(self, wandb_run: WandbRun) -> None:
        for number, event, row in self._rows.new():
            self._last = event
            if number >= wandb_run.first_row:
                wandb_run.log(row)
            if event.attempt == self._attempt:
                self._alert(wandb_run, number, alert_of(event))

    def _alert(self, wandb_run: WandbRun, number: int, alert: Alert | None) -> None:
        if alert is None or number in self._alerted:
            return
        self._alerted.add(number)
        wandb_run.alert(alert.title, alert.text, alert.level, at_most_every_s=ALERT_EVERY_S)

    def _end(self, wandb_run: WandbRun) -> int:
        try:
            self._send(wandb_run)
            outcome = "crashed"
            if isinstance(self._last, EndEvent) and self._last.attempt == self._attempt:
                outcome = self._last.outcome
            else:
                self._alert(wandb_run, self._rows.count, crashed(self._last.step))
            if wandb_run.finish(outcome, self._rows.count):
                return EXIT_SENT
        except Unreachable as error:
            log.warning("W&B may lack rows: %s", error)
            return EXIT_INCOMPLETE
        if not wandb_run.is_online:
            prove_room(self._run)
        return EXIT_INCOMPLETE if self._may_go_online else EXIT_OFFLINE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
