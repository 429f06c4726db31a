"""`peft-dist submit evaluate|quantize|merge`: what these commands take, and where they run."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from peft_dist.cli.slurm import Run, add_after, add_cluster
from peft_dist.common.arguments import add_merge_form, add_model_to_quantize
from peft_dist.common.console import show
from peft_dist.common.errors import EXIT_DONE

KINDS = ("evaluate", "quantize", "merge")


def join_words(argv: Sequence[str]) -> list[str]:
    """Return the arguments with `submit evaluate` and the like as the one word of a command."""
    if argv[:1] == ["submit"] and argv[1:2] and argv[1] in KINDS:
        return [" ".join(argv[:2]), *argv[2:]]
    return list(argv)


def add_commands(
    command: Callable[[str, Run, str], argparse.ArgumentParser], *, count: Callable[[str], int]
) -> None:
    """Add the commands.

    Args:
        command: Makes one, from its name, function and description.
        count: Reads an argument that is a number from 1.
    """
    evaluate = command("submit evaluate", _evaluate, "score a run's adapter in a Slurm job")
    evaluate.add_argument("run_dir", metavar="RUN_DIR", help="folder that train or submit made")
    evaluate.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's"
    )
    evaluate.add_argument(
        "--nproc", type=count, metavar="N", help="processes (default: as the cluster file says)"
    )
    evaluate.add_argument(
        "--nodes", type=count, default=1, metavar="N", help="nodes of the job (default: 1)"
    )
    _add_place(evaluate, "RUN_DIR/evaluate")
    quantize = command(
        "submit quantize", _quantize, "fill the cache of packed bases in a Slurm job"
    )
    add_model_to_quantize(quantize)
    _add_place(quantize, "runs/quantize-MODEL")
    merge = command("submit merge", _merge, "merge a run's LoRA into its base in a Slurm job")
    merge.add_argument("run_dir", metavar="RUN_DIR", help="folder that train or submit made")
    merge.add_argument("--out", metavar="DIR", required=True, help="folder to make")
    add_merge_form(merge)
    _add_place(merge, "RUN_DIR/merge")


def _add_place(parser: argparse.ArgumentParser, folder: str) -> None:
    add_cluster(parser)
    parser.add_argument("--time", metavar="HH:MM:SS", help="time limit of the job, or D-HH:MM:SS")
    add_after(parser)
    parser.add_argument(
        "--job-dir", metavar="DIR", help=f"folder of scripts, logs and notes (default: {folder})"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the scripts and the command; make and submit nothing",
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    from peft_dist.slurm.submit_command import evaluate_job

    where, overrides = _where(arguments), arguments.overrides
    made = evaluate_job(where, arguments.run_dir, overrides, processes=arguments.nproc)
    return _hand_over(made, dry_run=arguments.dry_run)


def _quantize(arguments: argparse.Namespace) -> int:
    from peft_dist.slurm.submit_command import quantize_job

    given = {"--revision": arguments.revision, "--task": arguments.task}
    options = {name: value for name, value in given.items() if value is not None}
    made = quantize_job(_where(arguments), arguments.model, options)
    return _hand_over(made, dry_run=arguments.dry_run)


def _merge(arguments: argparse.Namespace) -> int:
    from peft_dist.slurm.submit_command import merge_job

    made = merge_job(
        _where(arguments),
        arguments.run_dir,
        arguments.out,
        base=arguments.base,
        gguf=arguments.gguf,
    )
    return _hand_over(made, dry_run=arguments.dry_run)


def _where(arguments: argparse.Namespace) -> Any:
    from peft_dist.config.cluster import load_cluster
    from peft_dist.slurm.submit_command import Where

    return Where(
        cluster=load_cluster(arguments.cluster, options=arguments.sbatch),
        nodes=getattr(arguments, "nodes", 1),
        time=arguments.time,
        after=arguments.after,
        job_dir=arguments.job_dir,
    )


def _hand_over(made: Any, *, dry_run: bool) -> int:
    from peft_dist.slurm.submit_command import submit_command

    for warning in made.warnings:
        show(f"peft-dist: {warning}", sys.stderr)
    if dry_run:
        for path, text in made.files.items():
            show(f"==> {path} <==\n{text}")
        show(shlex.join(made.argv()))
        return EXIT_DONE
    show(submit_command(made).describe(made.folder))
    return EXIT_DONE
