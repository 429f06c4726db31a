"""GPU hours that the jobs of a run have had, by the run's own notes: a pure function of them."""

from collections.abc import Sequence
from contextlib import suppress

from peft_dist.common.durations import duration_s
from peft_dist.common.errors import ClusterError
from peft_dist.run.job_events import Event


def gpu_hours(history: Sequence[Event], now: float, *, is_at_work: bool) -> float | None:
    """Return the hours from the start to the end of each job, times its GPUs.

    A start that was killed before it could note its end counts until the next note, and no longer
    than its time limit.

    Args:
        history: The events of the run's jobs.
        now: Unix time.
        is_at_work: Whether the newest start still runs.

    Returns:
        None for a run that no job has had GPUs for, as far as the notes say.
    """
    total_s: float | None = None
    gpus, limit_s = 0, float("inf")
    for index, event in enumerate(history):
        if event["event"] == "submitted" and "by" in event:
            gpus, limit_s = _gpus(event), _limit_s(event)
        if event["event"] != "started" or not gpus:
            continue
        begun_s, later = _time(event), history[index + 1 :]
        if begun_s is None:
            continue
        own = [one for one in later if _start(one) == _start(event) and one["event"] == "ended"]
        newest = not any(one["event"] in ("started", "submitted") for one in later)
        ends = [time for one in own or later if (time := _time(one)) is not None]
        end_s = now if newest and is_at_work else min(ends, default=begun_s)
        total_s = (total_s or 0.0) + gpus * max(0.0, min(end_s - begun_s, limit_s))
    return None if total_s is None else total_s / 3600


def _start(event: Event) -> tuple[str, object]:
    return event["job"], event.get("restart")


def _time(event: Event) -> float | None:
    time = event.get("time")
    return float(time) if isinstance(time, int | float) else None


def _gpus(event: Event) -> int:
    gpus = event.get("gpus")
    return gpus if type(gpus) is int and gpus > 0 else 0


def _limit_s(event: Event) -> float:
    with suppress(ClusterError):
        return duration_s(str(event.get("time_limit")))
    return float("inf")
