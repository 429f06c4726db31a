"""The commands that look ahead: their arguments, and the one call of each.

Imports are inside the commands, as in `cli`.
"""

import argparse
from collections.abc import Callable

Run = Callable[[argparse.Namespace], int]

MOST_COUNTS = 32
"""Numbers of nodes that one plan compares."""


def add_commands(command: Callable[[str, Run, str], argparse.ArgumentParser]) -> None:
    """Add the commands, each made by `command` from its name, function and description."""
    plan = command("plan", _plan, "predict memory, speed and time of a recipe, and what fits")
    plan.add_argument("recipe", metavar="RECIPE", help="recipe file (YAML)")
    plan.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's"
    )
    plan.add_argument("--cluster", metavar="FILE", help="cluster file (YAML)")
    plan.add_argument(
        "--nodes", type=_numbers, default=[], metavar="N,N,...", help="nodes (default: 1,2,4)"
    )
    plan.add_argument("--gpu", metavar="KIND", help="kind of GPU (default: h100-80gb)")
    plan.add_argument(
        "--simulate",
        action="store_true",
        help="run the best way's start and two steps without memory: exact, and takes a minute",
    )
    plan.add_argument(
        "--runs",
        action="append",
        default=[],
        metavar="FOLDERS",
        help="learn the efficiency of the GPUs from runs, such as 'runs/*'; may be given again",
    )
    plan.add_argument("--json", action="store_true", help="print every figure as JSON")
    doctor = command("doctor", _doctor, "look for what would end a run on this machine")
    doctor.add_argument("recipe", nargs="?", metavar="RECIPE", help="recipe file (YAML)")
    doctor.add_argument("--cluster", metavar="FILE", help="cluster file (YAML)")


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and 1 <= int(part[:9]) < 10**5 for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}; must be whole numbers such as 1,2,4")
    if len(parts) > MOST_COUNTS:
        raise argparse.ArgumentTypeError(f"got {len(parts)} numbers; give at most {MOST_COUNTS}")
    return sorted({int(part) for part in parts})


def _doctor(arguments: argparse.Namespace) -> int:
    from peft_dist.plan.doctor import examine

    return examine(arguments.recipe, arguments.cluster)


def _plan(arguments: argparse.Namespace) -> int:
    from peft_dist.plan.command import show_plan

    return show_plan(
        arguments.recipe,
        arguments.overrides,
        cluster_file=arguments.cluster,
        nodes=arguments.nodes,
        gpu=arguments.gpu,
        simulate=arguments.simulate,
        as_json=arguments.json,
        runs=arguments.runs,
    )
