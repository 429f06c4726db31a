"""Send to W&B what it lacks of runs: rows of the ledger, and the adapter with its manifest.

The process of `peft-dist sync`. Of what a run's own process sent or kept it needs the id alone: the
ledger has every row, and the server returns how many of them it has.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from peft_dist.checkpoint.directory import folders
from peft_dist.common.console import say
from peft_dist.common.errors import (
    ERROR_PREFIX,
    EXIT_CRASHED,
    EXIT_DONE,
    PeftDistError,
    RunDirError,
)
from peft_dist.common.manifest import MANIFEST_FILE
from peft_dist.common.sharing import set_run_umask
from peft_dist.ledger.events import EndEvent
from peft_dist.ledger.reader import LedgerReader
from peft_dist.run.directory import RunDir
from peft_dist.tracking.wandb.identity import only_writer, wandb_environment
from peft_dist.tracking.wandb.rows import LedgerRows
from peft_dist.tracking.wandb.wandb_run import Unreachable, WandbRun

UPLOAD_TIMEOUT_S = 600.0
"""Seconds in which the rows of a run, and then its adapter, must be there."""


def main(argv: Sequence[str]) -> int:
    """Send runs, one after the other; return the worst of their exit codes."""
    set_run_umask()
    environment = wandb_environment(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    codes = [EXIT_DONE]
    for name in argv:
        try:
            say(f"{name}: {sync(RunDir.open(name))}")
        except (Unreachable, OSError) as error:
            say(f"{ERROR_PREFIX}{name}: {error}; try again later", sys.stderr)
            codes.append(EXIT_CRASHED)
        except PeftDistError as error:
            say(f"{ERROR_PREFIX}{error}", sys.stderr)
            codes.append(error.exit_code)
    return max(codes)


def sync(run: RunDir) -> str:
    """Send what W&B lacks of a run; return what was done, in one line.

    Raises:
        Unreachable: Where W&B does not answer, or not in time, or the run itself is sending.
        PeftDistError: Where there is no key, or nothing to send.
    """
    newest = LedgerReader(run.ledger).newest_start()
    if newest is None:
        raise RunDirError("has not begun to train", where=str(run.path), remedy="name another run")
    start, last = newest
    outcome = last.outcome if isinstance(last, EndEvent) else None
    rows, sent = LedgerRows(run.ledger), 0
    with only_writer(run, 0.0) as alone:
        if not alone:
            raise Unreachable("the run's own process is sending to W&B")
        wandb_run = WandbRun(
            run,
            start,
            online=True,
            is_last=outcome is not None,
            finish_timeout_s=UPLOAD_TIMEOUT_S,
        )
        for number, _, row in rows.new():
            if number >= wandb_run.first_row:
                wandb_run.log(row)
                sent += 1
        adapter = _adapter_files(run)
        if adapter:
            wandb_run.log_adapter(adapter, UPLOAD_TIMEOUT_S)
        if not wandb_run.finish(outcome, rows.count):
            raise Unreachable("W&B has not taken all rows")
    with_adapter = " and the adapter" if adapter else ""
    return f"sent {sent} of {rows.count} rows{with_adapter} to {wandb_run.url}"


def _adapter_files(run: RunDir) -> dict[str, Path]:
    """Return the files of a finished run's adapter, and the manifest of its last checkpoint."""
    if not run.is_finished:
        return {}
    files = {path.name: path for path in sorted(run.adapter.iterdir()) if path.is_file()}
    sealed = folders(run.checkpoints)[-1:]
    return files | {f"checkpoint-{MANIFEST_FILE}": folder / MANIFEST_FILE for folder in sealed}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
