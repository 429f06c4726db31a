"""The commands that submit, watch and end runs: their arguments, and the one call of each.

Imports are inside the commands, as in `cli`.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_dist.common.console import show
from peft_dist.common.errors import EXIT_DONE

Run = Callable[[argparse.Namespace], int]


def add_commands(
    command: Callable[[str, Run, str], argparse.ArgumentParser], *, count: Callable[[str], int]
) -> None:
    """Add the commands.

    Args:
        command: Makes one, from its name, function and description.
        count: Reads an argument that is a number from 1.
    """
    submit = command("submit", _submit, "hand a recipe, or an array of variants, to Slurm")
    submit.add_argument("recipe", metavar="RECIPE", help="recipe file (YAML)")
    submit.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's"
    )
    add_cluster(submit)
    submit.add_argument(
        "--run-dir", metavar="DIR", help="folder to make or go on with (default: runs/RECIPE)"
    )
    _add_size(submit)
    submit.add_argument(
        "--array",
        action="append",
        default=[],
        metavar="KEY=V1,V2,...",
        help="one run per value, of all combinations where given again; or a YAML file of lists",
    )
    submit.add_argument(
        "--chain",
        type=count,
        default=0,
        metavar="N",
        help="queue N more jobs that go on where the one before ends, for sites whose nodes may "
        "not submit (default: 0)",
    )
    submit.add_argument(
        "--try",
        dest="try_here",
        action="store_true",
        help="run the set-up of the cluster file and the imports here first",
    )
    submit.add_argument("--limit", type=int, metavar="N", help="most elements of an array at once")
    submit.add_argument(
        "--anyway", action="store_true", help="submit what cannot fit into the GPUs' memory too"
    )
    add_after(submit)
    submit.add_argument(
        "--frozen",
        action="store_true",
        help="end where packages or checkouts are others than now; else a start only says so",
    )
    submit.add_argument(
        "--snapshot",
        action="store_true",
        help="copy the checkouts that code is imported from beside the run, and run the copies",
    )
    submit.add_argument("--singleton", action="store_true", help="wait for other jobs of this name")
    submit.add_argument(
        "--fresh", action="store_true", help="start anew; a run that is there is renamed"
    )
    submit.add_argument(
        "--dry-run",
        action="store_true",
        help="print the scripts and the command; make and submit nothing",
    )
    fetch = command(
        "fetch",
        _fetch,
        "bring a recipe's model, tokenizer and rows here, for nodes without network",
    )
    fetch.add_argument("recipe", metavar="RECIPE", help="recipe file (YAML)")
    fetch.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's"
    )
    fetch.add_argument(
        "--cluster", metavar="FILE", help="fetch into the caches that its environment: names"
    )
    fetch.add_argument("--pack", action="store_true", help="fill the cache of packed bases as well")
    cluster = command("cluster", _probe, "list shipped cluster files, or write a first one")
    actions = cluster.add_subparsers(metavar="probe | list | show", required=True)
    text = "list the cluster files that are shipped; submit takes their names too"
    listed = actions.add_parser("list", help=text, description=text, allow_abbrev=False)
    listed.set_defaults(run=_list_clusters)
    text = "print a shipped cluster file, to copy and change"
    shown = actions.add_parser("show", help=text, description=text, allow_abbrev=False)
    shown.add_argument("name", metavar="NAME", help="as `peft-dist cluster list` names it")
    shown.set_defaults(run=_show_cluster)
    text = "ask sinfo and scontrol, and print a cluster file"
    probe = actions.add_parser("probe", help=text, description=text, allow_abbrev=False)
    probe.add_argument("--partition", metavar="NAME", help="partition (default: Slurm's own)")
    probe.add_argument("--out", metavar="FILE", help="file to make; none is overwritten")
    status = command("status", _status, "show how runs are, in one table")
    status.add_argument(
        "run_dirs", nargs="*", metavar="RUN_DIR", help="folders of runs (default: those in ./runs)"
    )
    status.add_argument("--watch", action="store_true", help="show it again every 2 s")
    status.add_argument("--json", action="store_true", help="print every figure as JSON")
    logs = command("logs", _logs, "show what the processes of a run said")
    logs.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run")
    logs.add_argument("--rank", type=_rank, metavar="N", help="only this rank, from 0")
    logs.add_argument(
        "--follow", action="store_true", help="go on with what comes, until the run is over"
    )
    logs.add_argument(
        "--lines", type=count, default=50, metavar="N", help="last lines of each log (default: 50)"
    )
    cancel = command("cancel", _cancel, "end a run's job, after a checkpoint")
    cancel.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folder that submit made")
    cancel.add_argument("--now", action="store_true", help="without a checkpoint")
    stop = command("stop", _stop, "end a run of this machine, after a checkpoint")
    stop.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run")
    stop.add_argument(
        "--wait-s", type=count, default=120, metavar="S", help="seconds to wait (default: 120)"
    )


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Add where a job goes."""
    parser.add_argument(
        "--cluster",
        metavar="FILE",
        required=True,
        help="cluster file (YAML), or the name of a shipped one",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="one more option of sbatch, such as mail-type=END or account=NAME",
    )


def add_after(parser: argparse.ArgumentParser) -> None:
    """Add what a job waits for."""
    parser.add_argument(
        "--after",
        action="append",
        default=[],
        metavar="RUN",
        help="wait until this run, array or command's job has ended well, over all its restarts; "
        "may be given again",
    )


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="nodes of the job (submit: as few as fit)"
    )
    parser.add_argument(
        "--time",
        metavar="HH:MM:SS",
        help="time limit of the job, or D-HH:MM:SS (submit: the cluster file's, or the plan's)",
    )


def _submit(arguments: argparse.Namespace) -> int:
    from peft_dist.config.cluster import load_cluster
    from peft_dist.slurm.submit import Request

    request = Request(
        recipe=arguments.recipe,
        overrides=arguments.overrides,
        folder=Path(arguments.run_dir or Path("runs") / Path(arguments.recipe).stem),
        cluster=load_cluster(arguments.cluster, options=arguments.sbatch),
        nodes=arguments.nodes,
        time=arguments.time,
        array=arguments.array,
        limit=arguments.limit,
        singleton=arguments.singleton,
        chain=arguments.chain,
        after=arguments.after,
        frozen=arguments.frozen,
        snapshot=arguments.snapshot,
        anyway=arguments.anyway,
    )
    if arguments.try_here:
        from peft_dist.slurm.validate import try_set_up

        try_set_up(request.cluster)
    return _hand_over(request, dry_run=arguments.dry_run, fresh=arguments.fresh, by="submit")


def resume_job(arguments: argparse.Namespace) -> int:
    """Submit a run once more, or the runs of an array that have not finished."""
    from peft_dist.slurm.resubmit import again

    request = again(
        Path(arguments.run_dir),
        arguments.overrides,
        nodes=arguments.nodes,
        time_limit=arguments.time,
        cluster=arguments.cluster,
        allow_changed=arguments.allow_changed,
    )
    return _hand_over(request, by="resume")


def _hand_over(request: Any, *, by: str, dry_run: bool = False, fresh: bool = False) -> int:
    from peft_dist.slurm.submit import prepare, submit

    submission = prepare(request)
    for warning in submission.warnings:
        show(f"peft-dist: {warning}", sys.stderr)
    if dry_run:
        for path, text in submission.files.items():
            show(f"==> {path} <==\n{text}")
        show(shlex.join(submission.argv(submission.wanted(fresh=fresh))))
        return EXIT_DONE
    queued = submit(submission, command=sys.argv, by=by, fresh=fresh)
    show(queued.describe(request.folder))
    return EXIT_DONE


def _fetch(arguments: argparse.Namespace) -> int:
    from peft_dist.config import load_recipe
    from peft_dist.config.cluster import load_cluster
    from peft_dist.launch.command import fetch_command, quantize_command, worker_environment
    from peft_dist.launch.launcher_process import run_tool
    from peft_dist.launch.packages import require_training_packages

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    environment = worker_environment()
    if arguments.cluster is not None:
        given = load_cluster(arguments.cluster).environment
        # What keeps nodes off the network must not keep us off it.
        kept = {name: str(given[name]) for name in given if not name.endswith("_OFFLINE")}
        environment |= kept
    require_training_packages()
    words = [str(Path(arguments.recipe).absolute()), *arguments.overrides]
    code = run_tool(fetch_command(words), environment=environment)
    if code != EXIT_DONE or not arguments.pack or recipe.quantization == "none":
        return code
    revision = [] if recipe.model.revision is None else ["--revision", recipe.model.revision]
    pack = quantize_command([recipe.model.name, *revision, "--task", recipe.head])
    return run_tool(pack, environment=environment)


def _probe(arguments: argparse.Namespace) -> int:
    from peft_dist.slurm.probe import probe_here

    return probe_here(arguments.partition, Path(arguments.out) if arguments.out else None)


def _list_clusters(arguments: argparse.Namespace) -> int:
    from peft_dist.config.cluster_sites import shipped_clusters, summary

    shipped = shipped_clusters()
    width = max(map(len, shipped))
    for name, file in shipped.items():
        show(f"{name:{width}}  {summary(file)}")
    return EXIT_DONE


def _show_cluster(arguments: argparse.Namespace) -> int:
    from peft_dist.config.cluster_sites import shipped_cluster

    show(shipped_cluster(arguments.name).read_text(encoding="utf-8"), end="")
    return EXIT_DONE


def _rank(text: str) -> int:
    if not text.isdecimal() or len(text) > 6:
        raise argparse.ArgumentTypeError(f"got {text!r}; must be a whole number from 0")
    return int(text)


def _status(arguments: argparse.Namespace) -> int:
    from peft_dist.status.command import show_status

    return show_status(arguments.run_dirs, watch=arguments.watch, as_json=arguments.json)


def _logs(arguments: argparse.Namespace) -> int:
    from peft_dist.status.logs import show_logs

    return show_logs(
        arguments.run_dir, rank=arguments.rank, follow=arguments.follow, lines=arguments.lines
    )


def _cancel(arguments: argparse.Namespace) -> int:
    from peft_dist.run.command_folder import find_folder
    from peft_dist.run.sweep import array_elements
    from peft_dist.slurm.job_control import cancel

    folders = []
    for name in arguments.run_dirs:
        folder = Path(name).absolute()
        elements = array_elements(folder)
        runs = [folder / element["run_dir"] for element in elements] or [find_folder(folder)]
        folders += runs
    cancel(folders, now=arguments.now, report=print)
    return EXIT_DONE


def _stop(arguments: argparse.Namespace) -> int:
    from peft_dist.run.directory import RunDir
    from peft_dist.run.holder import stop_holder

    show(stop_holder(RunDir.open(arguments.run_dir), wait_s=arguments.wait_s))
    return EXIT_DONE
