"""What people who follow a run are told of at once. Sends nothing itself."""

from typing import NamedTuple

from peft_dist.ledger.writer import Record

ALERT_EVERY_S = 300.0
"""An alert of one kind is sent no more often than this, however often it happens."""


class Alert(NamedTuple):
    """One message."""

    title: str
    text: str
    level: str
    """`INFO`, `WARN` or `ERROR`."""


def alert_of(record: Record) -> Alert | None:
    """Return the message that a record of the ledger is worth, if any."""
    event, step = record["event"], record["step"]
    reason = str(record.get("reason", ""))
    if event == "start" and record["attempt"] > 1:
        return Alert("Started again", f"attempt {record['attempt']}, after step {step}", "INFO")
    if event == "skipped":
        return Alert("Step skipped", reason, "WARN")
    if event == "rollback":
        return Alert("Rolled back", f"{reason}; back to step {record.get('back_to')}", "WARN")
    if event == "save_failed":
        return Alert("Checkpoint not written", f"step {step}: {reason}", "ERROR")
    if event == "end" and record.get("outcome") == "interrupted":
        return Alert("Interrupted", f"after step {step}; the same command goes on", "WARN")
    if event == "end" and record.get("outcome") != "done":
        return Alert("Ended early", f"{record.get('outcome')} after step {step}", "ERROR")
    return None


def crashed(last_step: int) -> Alert:
    """Return the message for an attempt that ended without a word."""
    return Alert("Ended early", f"crashed or killed after step {last_step}", "ERROR")
