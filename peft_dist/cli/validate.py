"""The command that checks a recipe, and shows its first rows as they are trained.

Imports are inside the commands, as in `main`.
"""

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peft_dist.cli.options import tell_given_twice
from peft_dist.common.console import show
from peft_dist.common.errors import EXIT_DONE, PeftDistError

if TYPE_CHECKING:
    from peft_dist.config import Recipe
    from peft_dist.launch.placement import Placement

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
    validate = command("validate", _validate, "check a recipe and its first rows, without torch")
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
    forms.add_argument(
        "--json",
        action="store_true",
        help="print all that is known as JSON; with --rows their tokens and mask",
    )


def _validate(arguments: argparse.Namespace) -> int:
    from peft_dist.config import load_recipe
    from peft_dist.data.first_rows import check_first_rows
    from peft_dist.launch.model_folder import check_model_folder
    from peft_dist.launch.placement import plan_processes, this_machine

    if arguments.rows is None and arguments.show_mask:
        raise PeftDistError("says how rows are shown", where="--show-mask", remedy="add --rows N")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    placement = plan_processes(recipe, this_machine())
    if arguments.rows is not None:
        tell_given_twice(arguments.overrides)
        return _show_rows(arguments)
    check_model_folder(recipe)
    check_first_rows(recipe)
    tell_given_twice(arguments.overrides)
    facts = _facts(recipe, placement)
    if arguments.json:
        whole = {"recipe_file": arguments.recipe, "valid": True, **facts}
        show(json.dumps(whole | {"recipe": recipe.model_dump(mode="json")}, indent=2))
        return EXIT_DONE
    show(f"{arguments.recipe}: valid")
    show(f"  processes: {placement.processes} ({placement.strategy})")
    _show_steps(facts)
    return EXIT_DONE


def _facts(recipe: "Recipe", placement: "Placement") -> dict[str, Any]:
    """Return the arithmetic of a recipe's batches on its processes."""
    from peft_dist.config.batch_shape import batch_shape, micro_batch_rows

    shape = batch_shape(recipe, placement.processes)
    batch = {"tokens": recipe.train.global_batch_tokens}
    if shape is not None:
        batch = {
            "rows": shape.rows_per_step,
            "rows_per_process": shape.rows_per_process,
            "passes": shape.accumulation,
            "micro_batch_size": micro_batch_rows(recipe),
        }
    return {
        "processes": placement.processes,
        "strategy": placement.strategy,
        "on_gpu": placement.on_gpu,
        "batch": batch,
        "steps": recipe.train.steps,
    }


def _show_steps(facts: dict[str, Any]) -> None:
    processes, batch = facts["processes"], facts["batch"]
    if "tokens" in batch:
        show(f"  a step: rows of up to {batch['tokens']} tokens together")
        return
    uneven = "at most " if batch["rows"] % processes else ""
    share = f", {uneven}{batch['rows_per_process']} per process" if processes > 1 else ""
    if processes > batch["rows"]:
        share += f" ({processes - batch['rows']} processes have none)"
    show(
        f"  a step: {_counted(batch['rows'], 'row')}{share} "
        f"in {_counted(batch['passes'], 'pass')} of up to {batch['micro_batch_size']}"
    )
    if facts["steps"] is not None:
        rows = facts["steps"] * batch["rows"]
        show(f"  the run: {_counted(facts['steps'], 'step')}, {_counted(rows, 'row')}")


def _counted(number: int, noun: str) -> str:
    """Return `1 row` or `2 rows`, `1 pass` or `2 passes`."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{ending}"


def _show_rows(arguments: argparse.Namespace) -> int:
    from peft_dist.launch.command import show_rows_command, worker_environment
    from peft_dist.launch.launcher_process import run_tool
    from peft_dist.launch.packages import require_training_packages

    require_training_packages()
    words = [arguments.recipe, *arguments.overrides, "--rows", str(arguments.rows)]
    words += ["--show-mask"] * arguments.show_mask + ["--json"] * arguments.json
    return run_tool(show_rows_command(words), environment=worker_environment())
