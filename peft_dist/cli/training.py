"""What `train`, `resume` and `evaluate` do once their arguments are read.

Imports are inside the commands, as in `cli`.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peft_dist.cli import slurm
from peft_dist.cli.options import tell_given_twice
from peft_dist.common.console import show
from peft_dist.common.errors import EXIT_DONE, PeftDistError

if TYPE_CHECKING:
    from peft_dist.config import Recipe
    from peft_dist.launch.run_here import LocalLaunch


def train(arguments: argparse.Namespace) -> int:
    """Train a recipe, or an array of its variants, here; return the exit code."""
    folder = Path(arguments.run_dir or Path("runs") / Path(arguments.recipe).stem)
    if arguments.json and not arguments.dry_run:
        arguments.parser.error("--json is for --dry-run")
    if arguments.array:
        return _train_array(arguments, folder)
    return _start(arguments, folder, dry_run=arguments.dry_run, fresh=arguments.fresh)


def _train_array(arguments: argparse.Namespace, folder: Path) -> int:
    """Train one run after the other, and show what became of them."""
    from peft_dist.common.sharing import set_run_umask, share_like
    from peft_dist.launch.command import shell_line
    from peft_dist.launch.packages import require_training_packages
    from peft_dist.launch.sweep_here import prepare_sweep, train_sweep
    from peft_dist.status.command import show_status

    sweep = prepare_sweep(
        Path(arguments.recipe),
        [*arguments.overrides, *_processes(arguments)],
        arguments.array,
        folder,
        prepare=partial(_prepare, arguments),
    )
    if arguments.dry_run:
        for element, start in zip(sweep.elements, sweep.starts, strict=True):
            show(f"{element['run_dir']}: {' '.join(element['settings'])}")
            show(f"  {shell_line(start.command, start.environment)}")
        return EXIT_DONE
    require_training_packages(sweep.starts[0].placement.strategy)
    share_like(folder)
    set_run_umask()
    code = train_sweep(sweep, fresh=arguments.fresh)
    show_status([str(folder)])
    return code


def _prepare(arguments: argparse.Namespace, recipe: "Recipe", folder: Path) -> "LocalLaunch":
    """Work out what starts a recipe here, with all that it leaves open chosen by the plan."""
    from peft_dist.launch.run_here import prepare
    from peft_dist.plan.settle import settle_here

    settled = settle_here(recipe)
    return prepare(
        settled.recipe,
        folder,
        allow_changed=arguments.allow_changed,
        prediction=settled.prediction(),
    )


def _processes(arguments: argparse.Namespace) -> list[str]:
    """Return the override that --nproc stands for."""
    return [] if arguments.nproc is None else [f"parallel.processes={arguments.nproc}"]


def resume(arguments: argparse.Namespace) -> int:
    """Go on with a run, here or on its cluster; return the exit code."""
    from peft_dist.launch.run_here import refuse_changes_of_finished
    from peft_dist.run.directory import RunDir
    from peft_dist.run.paths import ARRAY_FILE
    from peft_dist.slurm.job_scripts import JOB_SCRIPT
    from peft_dist.slurm.resubmit import was_submitted

    folder = Path(arguments.run_dir)
    is_local_array = (folder / ARRAY_FILE).is_file() and not (folder / JOB_SCRIPT).is_file()
    if is_local_array and not arguments.cluster:
        raise PeftDistError(
            "is an array of this machine",
            where=arguments.run_dir,
            remedy="give its `peft-dist train ... --array` again: what has finished stays",
        )
    on_cluster = not arguments.here and (arguments.cluster or was_submitted(folder))
    if arguments.more_epochs is not None:
        return _train_longer(arguments, on_cluster=bool(on_cluster))
    if on_cluster:
        return slurm.resume_job(arguments)
    run = RunDir.open(arguments.run_dir)
    if run.is_finished:
        refuse_changes_of_finished(run, arguments.overrides)
        show(f"{arguments.run_dir} has finished; nothing is left to do")
        return EXIT_DONE
    arguments.recipe = str(run.recipe)
    return _start(arguments, run.path)


def _train_longer(arguments: argparse.Namespace, *, on_cluster: bool) -> int:
    """Go on with a finished run for more epochs, as a new run that names it; return the code."""
    from peft_dist.config import load_recipe
    from peft_dist.run.directory import RunDir

    parent, epochs = RunDir.open(arguments.run_dir), arguments.more_epochs
    settings = [
        f"method.start_from={json.dumps(str(parent.path))}",
        "train.steps=null",
        f"train.epochs={epochs}",
    ]
    problem, remedy = None, "leave --more-epochs out"
    if not parent.is_finished:
        problem = "has not finished"
    elif load_recipe(parent.recipe, check_paths=False).objective.has_reference:
        # The start is the reference: that of the new run would be another.
        problem = "was trained against the adapter it started from, which more epochs would replace"
        remedy = "train its recipe anew with more train.epochs"
    elif on_cluster:
        problem = "was submitted to Slurm"
        remedy = f"submit its recipe.yaml with {' '.join(settings)}, or add --here"
    if problem is not None:
        raise PeftDistError(problem, where=arguments.run_dir, remedy=remedy)
    arguments.recipe = str(parent.recipe)
    arguments.overrides = [*arguments.overrides, *settings]
    name = f"{parent.path.name}-plus-{epochs}-epoch{'s' if epochs > 1 else ''}"
    return _start(arguments, parent.path.with_name(name))


def _start(
    arguments: argparse.Namespace, folder: Path, *, dry_run: bool = False, fresh: bool = False
) -> int:
    """Train a recipe in a run directory, from wherever that has come to."""
    from peft_dist.common.sharing import set_run_umask, share_like
    from peft_dist.config import load_recipe, render_recipe
    from peft_dist.launch.command import shell_line
    from peft_dist.launch.packages import require_training_packages
    from peft_dist.launch.run_here import train_here

    recipe = load_recipe(arguments.recipe, [*arguments.overrides, *_processes(arguments)])
    start = _prepare(arguments, recipe, folder)
    recipe = start.recipe
    tell_given_twice(arguments.overrides)
    if dry_run and arguments.json:
        facts = {"run_dir": str(start.run.path), "recipe": recipe.model_dump(mode="json")}
        facts |= {"command": start.command, "environment": start.environment}
        show(json.dumps(facts, indent=2))
        return EXIT_DONE
    if dry_run:
        command = shell_line(start.command, start.environment)
        show(f"{render_recipe(recipe)}\n{command}")
        return EXIT_DONE
    require_training_packages(start.placement.strategy)
    share_like(folder)
    set_run_umask()
    return train_here(start, fresh=fresh)


def evaluate(arguments: argparse.Namespace) -> int:
    """Score the adapter of a finished run; return the exit code."""
    from peft_dist.config import load_recipe
    from peft_dist.launch.command import launch_environment, worker_command
    from peft_dist.launch.packages import require_training_packages
    from peft_dist.launch.placement import plan_processes, this_machine
    from peft_dist.launch.run_here import run_here
    from peft_dist.run.directory import RunDir

    run = RunDir.open(arguments.run_dir)
    recipe = load_recipe(run.recipe, [*arguments.overrides, *_processes(arguments)])
    placement = plan_processes(recipe, this_machine())
    require_training_packages(placement.strategy)
    command = worker_command(placement, "score.py", [str(run.path), *arguments.overrides])
    run.evaluation_log.unlink(missing_ok=True)
    environment = launch_environment(placement, os.environ)
    return run_here(command, environment, error_log=run.evaluation_log)
