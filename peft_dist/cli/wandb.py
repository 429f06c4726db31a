"""The commands of `peft-dist` that speak to W&B: their arguments, and the process of each.

Imports are inside the commands, as in `cli`; W&B's libraries are only imported by those processes.
"""

import argparse
import importlib.util
from collections.abc import Callable

from peft_dist.common.errors import LaunchError

Run = Callable[[argparse.Namespace], int]


def add_commands(command: Callable[[str, Run, str], argparse.ArgumentParser]) -> None:
    """Add the commands.

    Args:
        command: Makes one, from its name, function and description.
    """
    sync = command("sync", _sync, "send to W&B what it lacks of runs, and their adapters")
    sync.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folder that train made")
    dashboard = command("dashboard", _dashboard, "make or update the dashboard of a W&B project")
    dashboard.add_argument("project", metavar="PROJECT", help="W&B project that has runs")
    dashboard.add_argument(
        "--entity", metavar="NAME", help="W&B team or user (default: the account's own)"
    )


def _sync(arguments: argparse.Namespace) -> int:
    from peft_dist.launch.command import tracking_command, worker_environment
    from peft_dist.launch.launcher_process import run_tool

    _require("wandb")
    command = tracking_command("sync", arguments.run_dirs)
    return run_tool(command, environment=worker_environment())


def _dashboard(arguments: argparse.Namespace) -> int:
    from peft_dist.launch.command import tracking_command, worker_environment
    from peft_dist.launch.launcher_process import run_tool

    _require("wandb", "wandb_workspaces")
    entity = [] if arguments.entity is None else ["--entity", arguments.entity]
    command = tracking_command("dashboard", [arguments.project, *entity])
    return run_tool(command, environment=worker_environment())


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise LaunchError(
            f"{' and '.join(missing)} not installed", remedy="pip install 'peft-dist[wandb]'"
        )
