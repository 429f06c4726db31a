"""How the nodes of a job learn that the launcher of one of them has failed.

torchrun on the other nodes would wait minutes for it to come back. Decides nothing.
"""

import time
from contextlib import suppress
from pathlib import Path

from peft_dist.common.atomic import replace_file

LOOK_EVERY_S = 1.0
GRACE_S = 10.0
"""How long ours may run on after another node's launcher failed: most often it ends by itself."""


class Peers:
    """The other nodes in this start of the job."""

    def __init__(self, folder: Path, *, name: str, nonce: str) -> None:
        """Take the folder of this start's logs, this node's name, and what tells this try apart."""
        self._folder, self._suffix = folder, f".{nonce}.failed"
        self._own = folder / f"{name}{self._suffix}"
        self._look_at_s = 0.0
        self._seen_at_s: float | None = None
        self.lost: str | None = None
        """What another node said, whose launcher failed while ours went on."""

    def say_failed(self, reason: str) -> None:
        """Tell the others in one line that, and how, this node's launcher has failed."""
        with suppress(OSError):  # then they wait until srun ends them
            replace_file(self._own, reason)

    def have_lost_one(self) -> bool:
        """Say whether another node's launcher has failed some time ago."""
        now_s = time.monotonic()
        if now_s < self._look_at_s:
            return False
        self._look_at_s = now_s + LOOK_EVERY_S
        failed = sorted(self._folder.glob(f"*{self._suffix}"))
        if failed and self._seen_at_s is None:
            self._seen_at_s = now_s
        if self._seen_at_s is None or now_s - self._seen_at_s < GRACE_S:
            return False
        if failed:
            self.lost = failed[0].read_text(encoding="utf-8")
        return self.lost is not None
