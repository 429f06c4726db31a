"""A cluster to play with: `python -m tests.cluster` gives a shell in which Slurm's commands work.

With arguments it runs them as a command instead of the shell. The cluster ends with either.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cluster.slurm import SlurmCluster, why_not, without_slurm


def main() -> int:
    """Start a cluster, run a shell or a command, and remove the cluster; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("--nodes", type=int, default=4, help="how many; default 4")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="default: your shell")
    chosen = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal leaves no files either
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    argv = chosen.command or [os.environ.get("SHELL", "/bin/sh")]
    with tempfile.TemporaryDirectory(prefix="peft-dist-cluster-") as folder:
        base = Path(folder) / "cluster"
        with SlurmCluster.start(base, nodes=chosen.nodes) as cluster:
            if not chosen.command:
                tell(cluster)
            # Ctrl-C is for the shell. It would inherit SIG_IGN, but no handler.
            signal.signal(signal.SIGINT, lambda *_: None)
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            environment = without_slurm(os.environ) | {"PATH": path} | cluster.environment
            return subprocess.run(argv, env=environment, check=False).returncode


def tell(cluster: SlurmCluster) -> None:
    """Say what there is."""
    print(
        f"{cluster.site.nodes} nodes; partitions main, low (can be preempted) and high (preempts)\n"
        f"logs: {cluster.base / 'log'}\n"
        "sinfo, sbatch, srun, sacct and peft-dist talk to it from this shell; its end is theirs"
    )


if __name__ == "__main__":
    sys.exit(main())
