"""Build the one command line, and the environment, that start the worker processes.

Pure: runs nothing. Everything that starts training, here or in a job script, uses this.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_dist.common import paths
from peft_dist.launch.placement import Placement


@dataclass(frozen=True)
class Meeting:
    """How the launchers of several nodes find each other; every node runs one.

    In a job script these are the names of variables that each node knows the value of.
    """

    node: str
    """Which node this is, from 0."""
    host: str
    """Name of node 0, whose launcher serves the rendezvous."""
    port: str
    settings: str
    """torchrun's `rdzv_conf`: see `distributed.fixed_nodes`."""


def worker_command(
    placement: Placement,
    script: str,
    arguments: Sequence[str],
    *,
    python: str = sys.executable,
    root: Path | None = None,
    max_restarts: int = 0,
    meeting: Meeting | None = None,
) -> list[str]:
    """Return the argv that starts this node's share of `placement.processes` workers.

    Args:
        placement: What `place` decided.
        script: `train.py` or `score.py`.
        arguments: What every worker gets: the run's own recipe, or the run directory.
        python: The interpreter whose packages the workers use.
        root: Folder that holds `launch/`. Default: this installation's.
        max_restarts: How often torchrun starts all workers again, in place, after one crashed.
        meeting: Where the nodes meet, where there are several.
    """
    launch = (root or paths.root()) / "launch"
    command = [
        python,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(launch / "strategies" / f"{placement.strategy}.yaml"),
        "--num_processes",
        str(placement.processes),
    ]
    if meeting is not None:
        command += ["--num_machines", str(placement.nodes), "--machine_rank", meeting.node]
        command += ["--main_process_ip", meeting.host, "--main_process_port", meeting.port]
        command += ["--rdzv_conf", meeting.settings]
        if placement.strategy in ("zero2", "zero3"):
            command += ["--deepspeed_multinode_launcher", "standard"]  # torchrun, not ssh
    if placement.strategy == "hsdp":
        command += [
            "--parallelism_config_dp_replicate_size",
            str(placement.replicas),
            "--parallelism_config_dp_shard_size",
            str(placement.shard_size),
        ]
    # Not c10d, which unpickles what anybody writes to its port.
    command += ["--rdzv_backend", "peft-dist"]
    if max_restarts:
        command += ["--max_restarts", str(max_restarts)]
    return [*command, str(launch / script), *arguments]


def quantize_command(arguments: Sequence[str], *, python: str = sys.executable) -> list[str]:
    """Return the argv that fills the packed-base cache; the arguments are the module's own."""
    return [python, "-m", "peft_dist.entrypoints.tool", "quantize", *arguments]


def fetch_command(arguments: Sequence[str], *, python: str = sys.executable) -> list[str]:
    """Return the argv that brings a recipe's model, tokenizer and rows to this machine."""
    return [python, "-m", "peft_dist.entrypoints.fetch", *arguments]


def show_rows_command(arguments: Sequence[str], *, python: str = sys.executable) -> list[str]:
    """Return the argv that tokenises the first rows of a recipe and prints them."""
    return [python, "-m", "peft_dist.entrypoints.show_rows", *arguments]


def check_models_command(arguments: Sequence[str], *, python: str = sys.executable) -> list[str]:
    """Return the argv that tries decoders; the arguments are the module's own."""
    return [python, "-m", "peft_dist.entrypoints.check_models", *arguments]


def merge_command(
    run_dir: Path,
    out: Path,
    *,
    base: str = "full",
    gguf: str | None = None,
    python: str = sys.executable,
) -> list[str]:
    """Return the argv that merges a run's adapter into its base."""
    words = merge_words(run_dir, out, base=base, gguf=gguf)
    return [python, "-m", "peft_dist.entrypoints.tool", *words]


def merge_words(run_dir: Path, out: Path, *, base: str, gguf: str | None) -> list[str]:
    """Return the command `merge` with its arguments."""
    words = ["merge", str(run_dir), "--out", str(out), "--base", base]
    return words if gguf is None else [*words, "--gguf", gguf]


def tracking_command(
    module: str, arguments: Sequence[str], *, python: str = sys.executable
) -> list[str]:
    """Return the argv of a process that speaks to W&B: `sync` or `dashboard`."""
    return [python, "-m", f"peft_dist.tracking.wandb.{module}", *arguments]


def launch_environment(placement: Placement, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to `environ` for the launcher."""
    extra = worker_environment()
    if not placement.on_gpu:
        # Without it Accelerate's own state believes, on a CPU, that each process is alone.
        extra["ACCELERATE_USE_CPU"] = "true"
        if placement.strategy in ("zero2", "zero3"):
            extra["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed says at length that it found no GPU
    if placement.nodes == 1:
        # Else torchrun warns that Accelerate has named a port and no rendezvous uses it.
        extra["PET_RDZV_ENDPOINT"] = "127.0.0.1:0"
    if "OMP_NUM_THREADS" not in environ:
        # Else every process takes every core (torchrun) or just one of them (Accelerate).
        extra["OMP_NUM_THREADS"] = str(placement.threads_per_process)
    return extra


def worker_environment() -> dict[str, str]:
    """Return the variables that every data-plane process gets."""
    # The script's folder and the current one stay off sys.path: `launch/score.py` or a folder
    # `wandb/` that a run left behind would otherwise be imported instead of the library.
    return {"PYTHONSAFEPATH": "1"}


def shell_line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return a command as one line that a shell would run the same way."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*settings, shlex.join(command)])
