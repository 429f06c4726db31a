"""What a launcher has left in the environment of a shell."""

from collections.abc import Iterator

from peft_dist.checks.context import CheckContext
from peft_dist.checks.finding import Finding

STALE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
         "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # fmt: skip
"""What a launcher exports to its workers; in a shell it is left over from something."""


def check_launcher_variables(context: CheckContext) -> Iterator[Finding]:
    """Look for what a launcher left behind, in a shell or in the set-up of a cluster file."""
    environ, in_shell = context.environ, context.run_dir is None
    stale = [name for name in STALE if name in environ]
    if stale and in_shell:
        text = f"{', '.join(stale)} of a launcher is set in this shell"
        yield Finding("bad", "launcher variables", text, f"unset {' '.join(stale)}")
    elif stale:  # ours sets those of each rank anew
        text = f"{', '.join(stale)} of a launcher is set before ours starts"
        remedy = "leave it out of setup: in the cluster file"
        yield Finding("note", "launcher variables", text, remedy)
    if in_shell and "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ:
        text = f"this shell is inside Slurm job {environ['SLURM_JOB_ID']}"
        remedy = "`submit` from a login node, or `train` on this node alone"
        yield Finding("note", "launcher variables", text, remedy)
