"""The one list of checks of a machine, and how they are made: each for a limited time."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from peft_dist.checks.context import CheckContext
from peft_dist.checks.finding import Finding
from peft_dist.checks.folders import check_caches, check_run_dir
from peft_dist.checks.gpus import check_gpus
from peft_dist.checks.launcher_variables import check_launcher_variables
from peft_dist.checks.network import check_hub, check_interfaces, check_links, check_own_name
from peft_dist.checks.packages import check_packages

GRACE_S = 1.0
"""How much longer than its own limit a check may take that has one."""


@dataclass(frozen=True)
class Check:
    """One of them."""

    name: str
    look: Callable[[CheckContext], Iterable[Finding]]


GPUS = Check("GPUs", check_gpus)
"""Where torch is to look at them, they wait until it is there."""
CHECKS = (
    Check("packages", check_packages),
    GPUS,
    Check("run directory", check_run_dir),
    Check("caches", check_caches),
    Check("launcher variables", check_launcher_variables),
    Check("links", check_links),
    Check("own name", check_own_name),
    Check("interfaces", check_interfaces),
    Check("hub", check_hub),
)


class Looking:
    """Checks of one machine that are being made, each in a thread: any may hang."""

    def __init__(self, context: CheckContext, checks: Sequence[Check] = CHECKS) -> None:
        """Start them all."""
        self._checks = checks
        self._until_s = time.monotonic() + context.limit_s + GRACE_S
        self._limit_s = context.limit_s
        self._done: queue.SimpleQueue[tuple[Check, list[Finding] | BaseException]]
        self._done = queue.SimpleQueue()
        for check in checks:
            name = f"check of {check.name}"
            threading.Thread(
                target=self._look, args=(check, context), name=name, daemon=True
            ).start()

    def _look(self, check: Check, context: CheckContext) -> None:
        try:
            self._done.put((check, list(check.look(context))))
        except BaseException as error:  # for whoever waits to raise
            self._done.put((check, error))

    def findings(self) -> list[Finding]:
        """Return what they have found, in their order, those that hang with that.

        Raises:
            Exception: What a check has raised.
        """
        found: dict[str, list[Finding]] = {}
        while len(found) < len(self._checks):
            try:
                left_s = max(0.0, self._until_s - time.monotonic())
                check, result = self._done.get(timeout=left_s)
            except queue.Empty:
                break
            if isinstance(result, BaseException):
                raise result
            found[check.name] = result
        for check in self._checks:
            text = f"the check of {check.name} does not end within {self._limit_s:.3g} s"
            found.setdefault(check.name, [Finding("note", check.name, text)])
        return [finding for check in self._checks for finding in found[check.name]]
