"""The commands that begin something: copies of what comes with the program, and the next step.

Imports are inside the commands, as in `main`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from peft_dist.common.console import show
from peft_dist.common.errors import EXIT_DONE

PRESETS = {
    "qlora-1gpu": "llama-3.1-8b-qlora",
    "qlora-node": "llama-3.3-70b-qlora",
    "qlora-slurm": "llama-3.1-405b-qlora",
    "qlora-cpu": "quickstart",
    "lora-1gpu": "llama-2-7b-lora",
    "chat": "chat",
    "classify": "classify",
    "dpo-cpu": "dpo",
}
"""What one wants to do, and the recipe to begin with."""
Run = Callable[[argparse.Namespace], int]


def add_commands(command: Callable[[str, Run, str], argparse.ArgumentParser]) -> None:
    """Add the commands.

    Args:
        command: Makes one, from its name, function and description.
    """
    init = command("init", _init, "make a folder with a recipe and rows to start from")
    init.add_argument("folder", metavar="DIR", help="folder to copy into; nothing is overwritten")
    init.add_argument(
        "--preset",
        choices=PRESETS,
        metavar="NAME",
        help=f"what to begin with: {', '.join(PRESETS)} (default: all launchers and recipes)",
    )
    recipes = command("recipes", _ls, "list the recipes that come with the program, or copy one")
    actions = recipes.add_subparsers(metavar="ls|cp", required=True)
    text = "list the recipes, with the preset that begins with each"
    ls = actions.add_parser("ls", help=text, description=text, allow_abbrev=False)
    ls.add_argument("--json", action="store_true", help="print them as JSON")
    ls.set_defaults(run=_ls, parser=ls)
    text = "copy a recipe and its rows"
    copy = actions.add_parser("cp", help=text, description=text, allow_abbrev=False)
    copy.add_argument("name", metavar="NAME", help="recipe, as `recipes ls` names it")
    copy.add_argument("folder", metavar="DIR", help="folder to copy into; nothing is overwritten")
    copy.set_defaults(run=_cp, parser=copy)


def _init(arguments: argparse.Namespace) -> int:
    from peft_dist.config.shipped import copy_all, copy_recipe

    folder = Path(arguments.folder)
    if arguments.preset is None:
        made = copy_all(folder)
        show(f"made {', '.join(map(str, made))}")
        show(f"next: peft-dist validate {made[1] / 'recipes' / 'quickstart.yaml'}")
        return EXIT_DONE
    name, for_slurm = PRESETS[arguments.preset], "slurm" in arguments.preset
    _introduce(copy_recipe(name, folder, called="recipe", for_slurm=for_slurm))
    return EXIT_DONE


def _cp(arguments: argparse.Namespace) -> int:
    from peft_dist.config.shipped import copy_recipe

    _introduce(copy_recipe(arguments.name, Path(arguments.folder)))
    return EXIT_DONE


def _introduce(made: list[Path]) -> None:
    """Say what was made and what comes next."""
    from peft_dist.config import load_recipe

    recipe_file, *rest = made
    recipe = load_recipe(recipe_file, check_paths=False)
    show("made " + ", ".join(map(str, made)))
    show("next:")
    steps = [f"edit {recipe_file}: your model and your rows in place of the example's"]
    if "/.cache/peft-dist/models/" in recipe.model.name:
        steps.append(
            f"python -m peft_dist.entrypoints.quickstart {recipe_file}   # its small model"
        )
    steps.append(f"peft-dist validate {recipe_file}")
    cluster = next((path for path in rest if path.name == "cluster.yaml"), None)
    if cluster is None:
        steps.append(f"peft-dist train {recipe_file}")
    else:
        steps += [
            f"edit {cluster}, or put there what `peft-dist cluster probe` prints",
            f"peft-dist submit {recipe_file} --cluster {cluster} --nodes 4 --dry-run",
        ]
    for step in steps:
        show(f"  {step}")


def _ls(arguments: argparse.Namespace) -> int:
    from peft_dist.common.table import Column, print_lines, stdout_form, table_lines
    from peft_dist.config.shipped import shipped_recipes

    found = list(shipped_recipes())
    presets = {name: preset for preset, name in PRESETS.items()}
    if arguments.json:
        facts = [
            {
                "name": one.name,
                "preset": presets.get(one.name),
                "purpose": one.purpose,
                "path": str(one.path),
                "model": one.recipe.model.name,
                "quantization": one.recipe.quantization,
                "method": one.recipe.method.kind,
                "objective": one.recipe.objective.kind,
                "strategy": one.recipe.parallel.strategy,
            }
            for one in found
        ]
        show(json.dumps(facts, indent=2))
        return EXIT_DONE
    columns = [
        Column("recipe", style=lambda _: "cyan"),
        Column("preset"),
        Column("method"),
        Column("base"),
        Column("strategy"),
        Column("what it is for", wrap=True),
    ]
    rows = [
        [
            one.name,
            presets.get(one.name, "-"),
            one.recipe.method.kind,
            one.recipe.quantization,
            one.recipe.parallel.strategy,
            one.purpose,
        ]
        for one in found
    ]
    width, colour = stdout_form()
    print_lines(table_lines(columns, rows, width=width, colour=colour))
    return EXIT_DONE
