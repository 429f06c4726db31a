"""The names of all environment variables of this project's own.

Those of Slurm, torchrun, Accelerate and W&B keep their names where they are read.
"""

CACHE = "PEFT_DIST_CACHE"
"""Set by users: the folder for what can be made again."""
STAGED = "PEFT_DIST_STAGED"
"""JSON that maps a recipe's `model.name` to this node's own copy of it."""

LAUNCH_MARK = "PEFT_DIST_LAUNCH"
"""By which the processes that `peft-dist` starts are found."""
LAUNCHED_AT = "PEFT_DIST_LAUNCHED_AT"
"""The unix time at which the launcher of a process was started."""
FAILURES = "PEFT_DIST_FAILURES"
"""The folder in which a worker leaves its error for its launcher."""
WATCHED_LEASE = "PEFT_DIST_WATCHED_LEASE"
"""The beat of an attempt on another machine that the launcher has watched, and found silent."""
RANK_LOGS = "PEFT_DIST_RANK_LOGS"
"""Where each rank writes a log of its own, PREFIX.rank-3.0.log: in a job on many nodes nobody could
tell their lines apart."""

AFTER_JOB = "PEFT_DIST_AFTER"
"""The Slurm job that is over, and that this one goes on for."""
HEAD = "PEFT_DIST_HEAD"
"""The node of rank 0."""
HOSTS = "PEFT_DIST_HOSTS"
"""All nodes of the job, separated by commas."""
PORT = "PEFT_DIST_PORT"
"""Where the processes meet on the head node."""
LOGS = "PEFT_DIST_LOGS"
"""The folder of this start's logs."""
NONCE = "PEFT_DIST_NONCE"
"""What tells this start's files and rendezvous from every other one's."""
TRY = "PEFT_DIST_TRY"
"""How many ports this start has tried."""
JOB_END = "PEFT_DIST_JOB_END"
"""The unix time at which Slurm ends the job."""

STORE_SECRET = "PEFT_DIST_STORE_SECRET"
"""What the processes of one start know, and nobody else."""
ROUND = "PEFT_DIST_ROUND"
"""How often the processes of this start were started, from 1."""
