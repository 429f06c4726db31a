"""The commands that make models: their arguments, and the process of each.

Imports are inside the commands, as in `cli`; torch is only imported by those processes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from peft_dist.cli.options import add_verbosity
from peft_dist.common.arguments import add_merge_form, add_model_to_quantize
from peft_dist.common.errors import PeftDistError

Run = Callable[[argparse.Namespace], int]


def add_commands(command: Callable[[str, Run, str], argparse.ArgumentParser]) -> None:
    """Add the commands.

    Args:
        command: Makes one, from its name, function and description.
    """
    quantize = command(
        "quantize",
        _quantize,
        "store a model in 4 bits in the cache, ahead of the first run that needs it",
    )
    add_model_to_quantize(quantize)
    add_verbosity(quantize)
    merge = command(
        "merge",
        _merge,
        "add a run's LoRA to its base: a plain model that needs no PEFT",
    )
    merge.add_argument("run_dir", metavar="RUN_DIR", help="folder that train made")
    merge.add_argument("--out", metavar="DIR", required=True, help="folder to make for the model")
    add_merge_form(merge)
    add_verbosity(merge)


def _quantize(arguments: argparse.Namespace) -> int:
    from peft_dist.launch.command import quantize_command, worker_environment
    from peft_dist.launch.launcher_process import run_tool
    from peft_dist.launch.packages import require_training_packages

    words = [arguments.model, "--task", arguments.task]
    if arguments.revision is not None:
        words += ["--revision", arguments.revision]
    require_training_packages()
    return run_tool(quantize_command(words), environment=worker_environment())


def _merge(arguments: argparse.Namespace) -> int:
    from peft_dist.launch.command import merge_command, worker_environment
    from peft_dist.launch.launcher_process import run_tool
    from peft_dist.launch.packages import require_training_packages
    from peft_dist.run.directory import RunDir

    run = RunDir.open(arguments.run_dir)
    out = Path(arguments.out).absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise PeftDistError(
            "already there", where=str(out), remedy="choose another folder with --out"
        )
    require_training_packages()
    return run_tool(
        merge_command(run.path, out, base=arguments.base, gguf=arguments.gguf),
        environment=worker_environment(),
    )
