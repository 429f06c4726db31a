"""Run one node's part of a command that was submitted as a job: evaluate, quantize or merge.

It keeps nothing to go on from: where the job is preempted it begins again; a fault ends it.
"""

import sys
import time

from peft_dist.common.env import LAUNCHED_AT
from peft_dist.common.errors import EXIT_DONE
from peft_dist.common.job_end import job_end_s
from peft_dist.launch.launcher_process import run_launcher
from peft_dist.run.command_folder import read_command, write_result
from peft_dist.run.restart_policy import Ending, Kind
from peft_dist.slurm.look_back import NEAR_END_S
from peft_dist.slurm.secrets import read_secrets
from peft_dist.slurm.supervisor import Node, main


class CommandNode(Node):
    """This node, in this start of a command's job."""

    def work(self) -> Ending:
        """Run the command; return how it ended."""
        if self.cancelled.exists():
            return Ending(Kind.CANCELLED)
        began_s = time.time()
        secrets = {} if self.options.secrets is None else read_secrets(self.options.secrets)
        ended = run_launcher(
            self.launcher,
            environment={LAUNCHED_AT: repr(began_s), **secrets},
            error_log=None,
            is_lost=self.failed_nodes.have_one,
        )
        name = " ".join(read_command(self.run.path)[:1])
        if ended.code == EXIT_DONE:
            if self.is_head:
                write_result(self.run.path, began_s)
            return Ending(Kind.DONE)
        if ended.signal_name is not None:
            return self._stopped(name, ended.signal_name)
        if ended.failure is not None:
            return Ending(Kind.USER_ERROR, ended.failure.error)
        ending = self.failed_nodes.ending or self.failure()
        self.failed_nodes.add_own(ending)
        if ending.kind is Kind.NODE_FAILED:
            return ending
        return Ending(Kind.TRAINING_FAILED, f"{name} fails: {ending.error}; see {self.log}")

    def _stopped(self, name: str, signal_name: str) -> Ending:
        if self.cancelled.exists():
            return Ending(Kind.CANCELLED)
        if time.time() > job_end_s() - NEAR_END_S:
            return Ending(
                Kind.USER_ERROR, f"{name} needs more time; submit it again with a longer --time"
            )
        return Ending(Kind.INTERRUPTED, f"stopped by {signal_name}", signal_name)


if __name__ == "__main__":
    sys.exit(main(kind=CommandNode))
