"""Tell the head of a job that the launcher of another node has failed, by a file for each.

torchrun on the other nodes would wait minutes for it to come back. The head alone looks, as one
file system serves everybody: when it ends with a fault, Slurm ends the others.
"""

import json
import time
from contextlib import suppress
from pathlib import Path

from peft_dist.common.atomic import replace_file
from peft_dist.run.restart_policy import Ending, Kind

LOOK_EVERY_S = 5.0
GRACE_S = 10.0
"""How long ours may run on after another node's launcher failed: most often it ends by itself."""


class FailedNodes:
    """The nodes of this start of the job whose launcher has failed."""

    def __init__(self, folder: Path, *, name: str, nonce: str, looks: bool) -> None:
        """Look for nothing yet.

        Args:
            folder: That of this start's logs.
            name: This node's, or this task's.
            nonce: What tells this try apart.
            looks: Whether it looks at all.
        """
        self._looks = looks
        self._folder, self._suffix = folder, f".{nonce}.failed"
        self._own = folder / f"{name}{self._suffix}"
        self._look_at_s = 0.0
        self._seen_at_s: float | None = None
        self.ending: Ending | None = None
        """How another node's launcher failed while ours went on."""

    def add_own(self, ending: Ending) -> None:
        """Tell the head how this node's launcher has failed."""
        with suppress(OSError):  # then they wait until srun ends them
            replace_file(self._own, json.dumps({"kind": ending.kind, "error": ending.error}))

    def have_one(self) -> bool:
        """Whether another node's launcher has failed some time ago, as far as this one looks."""
        now_s = time.monotonic()
        if not self._looks or now_s < self._look_at_s:
            return False
        self._look_at_s = now_s + LOOK_EVERY_S
        failed = sorted(self._folder.glob(f"*{self._suffix}"))
        if failed and self._seen_at_s is None:
            self._seen_at_s = now_s
        if self._seen_at_s is None or now_s - self._seen_at_s < GRACE_S:
            return False
        if failed:
            found = json.loads(failed[0].read_text(encoding="utf-8"))
            of_memory = found["kind"] == Kind.OUT_OF_MEMORY
            kind = Kind.OUT_OF_MEMORY if of_memory else Kind.NODE_FAILED
            self.ending = Ending(kind, found["error"])
        return self.ending is not None
