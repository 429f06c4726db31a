"""`peft-dist validate`: whether a recipe can be used, and what comes of it, without torch."""

import argparse
import json
from typing import Any

from peft_dist.cli.options import tell_given_twice
from peft_dist.common.console import show
from peft_dist.common.errors import EXIT_DONE


def validate_recipe(arguments: argparse.Namespace) -> int:
    """Check a recipe and print how its steps are made; return the exit code."""
    from peft_dist.config import load_recipe
    from peft_dist.launch.placement import plan_processes, this_machine

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    tell_given_twice(arguments.overrides)
    placement = plan_processes(recipe, this_machine())
    facts = _facts(recipe, placement)
    if arguments.json:
        whole = {"recipe_file": arguments.recipe, "valid": True, **facts}
        show(json.dumps(whole | {"recipe": recipe.model_dump(mode="json")}, indent=2))
        return EXIT_DONE
    show(f"{arguments.recipe}: valid")
    show(f"  processes: {placement.processes} ({placement.strategy})")
    batch = facts["batch"]
    if "tokens" in batch:
        show(f"  a step: rows of up to {batch['tokens']} tokens together")
        return EXIT_DONE
    uneven = "at most " if batch["rows"] % placement.processes else ""
    share = f", {uneven}{batch['rows_per_process']} per process"
    if placement.processes == 1:
        share = ""
    show(
        f"  a step: {counted(batch['rows'], 'row')}{share} "
        f"in {counted(batch['passes'], 'pass')} of up to {batch['micro_batch_size']}"
    )
    if facts["steps"] is not None:
        rows = facts["steps"] * batch["rows"]
        show(f"  the run: {counted(facts['steps'], 'step')}, {counted(rows, 'row')}")
    return EXIT_DONE


def counted(number: int, noun: str) -> str:
    """Return `1 row` or `2 rows`, `1 pass` or `2 passes`."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{ending}"


def _facts(recipe: Any, placement: Any) -> dict[str, Any]:
    """Return the arithmetic of a recipe's batches on its processes."""
    from peft_dist.config.batch_shape import batch_shape

    shape = batch_shape(recipe, placement.processes)
    batch = {"tokens": recipe.train.global_batch_tokens}
    if shape is not None:
        batch = {
            "rows": shape.rows_per_step,
            "rows_per_process": shape.rows_per_process,
            "passes": shape.accumulation,
            "micro_batch_size": recipe.train.micro_batch_size,
        }
    return {
        "processes": placement.processes,
        "strategy": placement.strategy,
        "on_gpu": placement.on_gpu,
        "batch": batch,
        "steps": recipe.train.steps,
    }
