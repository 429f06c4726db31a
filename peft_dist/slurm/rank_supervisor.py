"""Supervise one rank of a job whose ranks Slurm starts: `launcher: srun`, a task for each.

The first task of a node looks after the node, as `supervisor` does; the others, here, begin when it
lets them, and end with it.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from peft_dist.common import env
from peft_dist.run.directory import RunDir
from peft_dist.run.history import mark_launch
from peft_dist.run.restart_policy import Ending, Kind
from peft_dist.slurm.failed_nodes import FailedNodes
from peft_dist.slurm.interfaces import interface_variables
from peft_dist.slurm.supervisor import Node, main

LOOK_EVERY_S = 0.5


class RankNode(Node):
    """A task that is not the first one of its node."""

    def __init__(self, options: argparse.Namespace, launcher: Sequence[str]) -> None:
        """Take another name than the node's: of a failure every task leaves a note of its own."""
        super().__init__(options, launcher)
        name = f"{self.name}.{os.environ['SLURM_LOCALID']}"
        nonce = os.environ[env.NONCE]
        self.failed_nodes = FailedNodes(self.log.parent, name=name, nonce=nonce, looks=False)

    @property
    def is_head(self) -> bool:
        """Whether this task decides: never."""
        return False

    def work(self) -> Ending:
        """Wait until the node is ready, and train."""
        run = RunDir.open(self.options.run_dir)
        if self.options.interface is not None:
            os.environ.update(interface_variables(self.options.interface, os.environ[env.HEAD]))
        before = mark_launch(run)
        while not self.ready.exists():
            if self.signals:
                return Ending(Kind.INTERRUPTED, f"stopped by {self.signals[0]}", self.signals[0])
            if self.decision_file.exists():
                return Ending(Kind.DONE)  # or whatever else the head has decided
            time.sleep(LOOK_EVERY_S)
        return self.train(run, before)


if __name__ == "__main__":
    # Outside a step, where the script looks back at one, there is no such variable.
    sys.exit(main(kind=Node if os.environ.get("SLURM_LOCALID", "0") == "0" else RankNode))
