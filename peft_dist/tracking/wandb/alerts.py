"""Which events are worth an alert to the people who follow a run, and its text."""

from typing import NamedTuple

from peft_dist.ledger import events

ALERT_EVERY_S = 300.0
"""An alert of one kind is sent no more often than this, however often it happens."""


class Alert(NamedTuple):
    """One message."""

    title: str
    text: str
    level: str
    """`INFO`, `WARN` or `ERROR`."""


def alert_of(event: events.LedgerEvent) -> Alert | None:
    """Return the message that an event is worth, if any."""
    step = event.step
    match event:
        case events.StartEvent() if event.attempt > 1:
            return Alert("Started again", f"attempt {event.attempt}, after step {step}", "INFO")
        case events.RollbackEvent():
            return Alert("Rolled back", f"{event.reason}; back to step {event.last_step}", "WARN")
        case events.SkippedEvent():
            return Alert("Step skipped", event.reason, "WARN")
        case events.SaveFailedEvent():
            return Alert("Checkpoint not written", f"step {step}: {event.reason}", "ERROR")
        case events.EndEvent(outcome="interrupted"):
            return Alert("Interrupted", f"after step {step}; the same command goes on", "WARN")
        case events.EndEvent() if event.outcome != "done":
            return Alert("Ended early", f"{event.outcome} after step {step}", "ERROR")
    return None


def crashed(last_step: int) -> Alert:
    """Return the message for an attempt that ended without an `end` event."""
    return Alert("Ended early", f"crashed or killed after step {last_step}", "ERROR")
