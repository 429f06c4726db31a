"""`peft-dist plan`: read, calculate, and where asked simulate; start no training."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from peft_dist.checks.network import hub_is_off
from peft_dist.common.console import show
from peft_dist.common.errors import EXIT_DONE, EXIT_USER_ERROR, LaunchError
from peft_dist.common.table import print_lines, stdout_form
from peft_dist.config import load_recipe
from peft_dist.config.cluster import Cluster, load_cluster
from peft_dist.plan.estimate import Estimate
from peft_dist.plan.hardware import GIB, Hardware, find_gpu, hardware_of
from peft_dist.plan.learn import learn
from peft_dist.plan.plan import Plan, make_plan
from peft_dist.plan.subject import Subject, read_config, subject_of
from peft_dist.plan.table import render

DEFAULT_GPU = "h100-80gb"
DEFAULT_NODES = (1, 2, 4)
SIMULATION_LIMIT_S = 1800


def show_plan(
    recipe_file: str,
    overrides: Sequence[str],
    *,
    cluster_file: str | None,
    nodes: Sequence[int],
    gpu: str | None,
    simulate: bool,
    as_json: bool,
    runs: Sequence[str] = (),
) -> int:
    """Print what a recipe takes; return 2 where nothing fits.

    Args:
        recipe_file: What to train.
        overrides: Settings that replace the recipe's.
        cluster_file: File or name of a cluster.
        nodes: Numbers of nodes to look at. Default: 1, 2 and 4.
        gpu: Kind of GPU. Default: the cluster's.
        simulate: Whether to run the best way on fake tensors.
        as_json: Whether to print JSON.
        runs: Folders of runs, or patterns of such, to learn efficiency from.

    Raises:
        PeftDistError: For a recipe, model or cluster that cannot be planned.
    """
    recipe = load_recipe(recipe_file, overrides, check_paths=False)
    cluster = None if cluster_file is None else load_cluster(cluster_file)
    hardware = _hardware(cluster, gpu)
    learned = learn(runs, hardware) if runs else None
    if learned is not None:
        hardware = learned.applied_to(hardware)
    config = read_config(
        recipe.model.name, recipe.model.revision, network=not hub_is_off(os.environ)
    )
    subject = subject_of(recipe, config)
    plan = make_plan(subject, hardware, _nodes(subject, cluster, hardware, nodes))
    found = _simulated(plan, recipe_file, overrides, config) if simulate else ""
    if as_json:
        simulated = {"simulated": json.loads(found)} if found else {}
        lessons = (
            {} if learned is None else {"learned": {**asdict(learned), "factor": learned.factor}}
        )
        show(json.dumps({**plan.figures(), **simulated, **lessons}, indent=2))
    else:
        width, colour = stdout_form()
        title, words = Path(recipe_file).name, _in_words(plan, found)
        print_lines(
            render(plan, title=title, simulated=words, learned=learned, width=width, colour=colour)
        )
    return EXIT_DONE if plan.best is not None else EXIT_USER_ERROR


def _hardware(cluster: Cluster | None, gpu: str | None) -> Hardware:
    named = gpu or (cluster.gpu if cluster is not None else None)
    where = "--gpu" if gpu else "gpu"
    return hardware_of(cluster, find_gpu(named or DEFAULT_GPU, where=where), gpus_per_node=None)


def _nodes(
    subject: Subject, cluster: Cluster | None, hardware: Hardware, asked: Sequence[int]
) -> list[int]:
    """Return the numbers of nodes to look at."""
    processes = subject.recipe.parallel.processes
    if processes is not None:  # then the recipe has said how many
        fewest = -(-processes // hardware.gpus_per_node)
        wrong = [count for count in asked if count < fewest or processes % count]
        if wrong:
            raise LaunchError(
                f"{processes} processes do not go onto {wrong[0]} nodes of "
                f"{hardware.gpus_per_node} GPUs",
                where="--nodes",
                remedy="leave parallel.processes out of the recipe, or name other nodes",
            )
        return list(asked) or [fewest]
    most = cluster.max_nodes if cluster is not None else None
    return list(asked) or [count for count in DEFAULT_NODES if most is None or count <= most]


def _simulated(
    plan: Plan, recipe_file: str, overrides: Sequence[str], config: dict[str, object]
) -> str:
    """Run the best row, or the first, on fake tensors in a process of its own; return its JSON."""
    found = _looked_at(plan)
    one = found.candidate
    words = [
        *overrides,
        f"parallel.strategy={one.strategy}",
        f"parallel.processes={one.processes}",
        f"train.micro_batch_size={one.micro_batch}",
        f"train.activation_checkpointing={str(one.recompute).lower()}",
        f"parallel.offload={'cpu' if one.offload else 'none'}",
        f"parallel.dequantized_blocks={one.dequantized}",
    ]
    if one.strategy == "hsdp":
        words.append(f"parallel.shard_size={one.shard_size}")
    if one.strategy in ("fsdp", "hsdp"):
        words.append(f"parallel.reshard={one.reshard}")
    dtype = plan.subject.recipe.model.dtype
    if dtype == "auto":
        words.append(f"model.dtype={'bfloat16' if plan.hardware.gpu.bfloat16 else 'float16'}")
    command = [
        sys.executable, "-m", "peft_dist.entrypoints.simulate", recipe_file, *words,
        "--per-node", str(one.processes // one.nodes),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command,
            input=json.dumps(config),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=SIMULATION_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"the simulation is not done after {SIMULATION_LIMIT_S} s",
            remedy="plan without --simulate",
        ) from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise LaunchError(
            f"the simulation failed: {lines[-1] if lines else 'without a word'}",
            remedy="plan without --simulate",
        )
    return done.stdout.strip().splitlines()[-1]


def _looked_at(plan: Plan) -> Estimate:
    return (plan.best or plan.rows[0]).estimate


def _in_words(plan: Plan, found: str) -> str:
    if not found:
        return ""
    simulated = json.loads(found)
    peak, planned = simulated["peak_bytes"], _looked_at(plan).bytes.allocated
    gathered = sum(simulated["carried_bytes"].values()) / 1e9
    return (
        f"simulated: {peak / GIB:.3f} GiB allocated (formulas: {planned / GIB:.3f}, "
        f"{planned / peak - 1:+.1%}); collectives carry {gathered:.1f} GB a step, "
        f"{simulated['flops'] / 1e12:,.1f} TFLOP a step and GPU"
    )
