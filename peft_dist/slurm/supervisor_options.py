"""The arguments that `node.sh` gives to what supervises a node."""

import argparse
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """Return the parser of what `node.sh` gives."""
    parser = argparse.ArgumentParser(prog="peft_dist.slurm.supervisor", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--max-starts", type=int, required=True)
    parser.add_argument("--max-starts-without-progress", type=int, required=True)
    parser.add_argument(
        "--after", type=int, metavar="CODE", help="only decide: the start is over, and srun's code"
    )
    parser.add_argument("--secrets", type=Path, help="file of mode 0600 with NAME=value lines")
    parser.add_argument("--interface", help="network interfaces as NCCL reads them, or auto")
    parser.add_argument("--frozen", action="store_true", help="refuse another environment")
    parser.add_argument("--no-preflight", action="store_true")
    parser.add_argument("--devices", type=int, default=0, help="GPUs that the node must have")
    parser.add_argument("--preflight-timeout-s", type=float, default=60.0)
    parser.add_argument("--arrival-s", type=float, default=1800.0)
    parser.add_argument("--min-free-gb", type=float, default=1.0)
    parser.add_argument("--max-clock-offset-s", type=float, default=60.0)
    return parser
