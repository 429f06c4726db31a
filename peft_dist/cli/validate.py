"""The command that checks a recipe, and shows its first rows as they are trained.

Imports are inside the commands, as in `main`.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from peft_dist.common.console import show
from peft_dist.common.errors import EXIT_DONE, PeftDistError

if TYPE_CHECKING:
    from peft_dist.config import Recipe

Run = Callable[[argparse.Namespace], int]


def add_command(
    command: Callable[[str, Run, str], argparse.ArgumentParser],
    add_recipe: Callable[[argparse.ArgumentParser], None],
    *,
    count: Callable[[str], int],
) -> None:
    """Add the command.

    Args:
        command: Makes one, from its name, function and description.
        add_recipe: Adds the arguments that name a recipe.
        count: Reads an argument that is a number from 1.
    """
    validate = command("validate", _validate, "check a recipe and its first rows; needs no torch")
    add_recipe(validate)
    validate.add_argument(
        "--rows",
        type=count,
        metavar="N",
        help="tokenise the first N lines and print them, what is trained in «»; exit code 2 where "
        "one is malformed",
    )
    forms = validate.add_mutually_exclusive_group()
    forms.add_argument("--show-mask", action="store_true", help="with --rows: long rows in full")
    forms.add_argument("--json", action="store_true", help="with --rows: tokens and mask as JSON")


def _validate(arguments: argparse.Namespace) -> int:
    from peft_dist.config import load_recipe
    from peft_dist.data.first_rows import check_first_rows
    from peft_dist.launch.placement import plan_processes, this_machine

    if arguments.rows is None and (arguments.show_mask or arguments.json):
        name = "--json" if arguments.json else "--show-mask"
        raise PeftDistError("says how rows are shown", where=name, remedy="add --rows N")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    placement = plan_processes(recipe, this_machine())
    if arguments.rows is not None:
        return _show_rows(arguments)
    check_first_rows(recipe)
    show(f"{arguments.recipe}: valid")
    show(f"  processes: {placement.processes} ({placement.strategy})")
    _show_steps(recipe, placement.processes)
    return EXIT_DONE


def _show_steps(recipe: "Recipe", processes: int) -> None:
    from peft_dist.config.batch_shape import batch_shape, micro_batch_rows

    shape = batch_shape(recipe, processes)
    if shape is None:
        show(f"  a step: rows of up to {recipe.train.global_batch_tokens} tokens together")
        return
    passes = "1 pass" if shape.accumulation == 1 else f"{shape.accumulation} passes"
    show(
        f"  a step: {shape.rows_per_step} rows, {shape.rows_per_process} per process "
        f"in {passes} of up to {micro_batch_rows(recipe)}"
    )
    if recipe.train.steps is not None:
        rows = recipe.train.steps * shape.rows_per_step
        show(f"  the run: {recipe.train.steps} steps, {rows} rows")


def _show_rows(arguments: argparse.Namespace) -> int:
    from peft_dist.launch.command import show_rows_command, worker_environment
    from peft_dist.launch.local import run_tool
    from peft_dist.launch.packages import require_training_packages

    require_training_packages()
    words = [arguments.recipe, *arguments.overrides, "--rows", str(arguments.rows)]
    words += ["--show-mask"] * arguments.show_mask + ["--json"] * arguments.json
    return run_tool(show_rows_command(words), environment=worker_environment())
