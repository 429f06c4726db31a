"""The `peft-dist` command: read arguments, call one function, map faults to exit codes.

Imports are inside the commands, so that `--help` starts at once. Trains nothing itself: torch is
only ever imported by the processes it starts.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from peft_dist.cli import plan, slurm, submit_command, validate, wandb
from peft_dist.common.arguments import add_allow_changed
from peft_dist.common.console import show
from peft_dist.common.errors import (
    ERROR_PREFIX,
    EXIT_CRASHED,
    EXIT_DONE,
    PeftDistError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        arguments = _parse(list(sys.argv[1:] if argv is None else argv))
        run: Callable[[argparse.Namespace], int] = arguments.run
        code = run(arguments)
        sys.stdout.flush()
        return code
    except PeftDistError as error:
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `peft-dist schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CRASHED


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        raise PeftDistError(message, remedy=f"see {self.prog} --help")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = build_parser()
    argv = submit_command.join_words(argv)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "quantize":
        arguments.passed_on = argv[argv.index("quantize") + 1 :]
        return arguments
    # argparse stops collecting key=value at the first option; those after it end up here.
    stray = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if stray:
        parser.error(f"unrecognized argument {stray[0]!r}")
    if rest:
        arguments.overrides += rest
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    from peft_dist import __version__

    parser = _Parser(
        prog="peft-dist",
        description="Fine-tune adapters on a frozen, 4-bit, sharded base model.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"peft-dist {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, *, own_help: bool = True
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False, add_help=own_help
        )
        sub.set_defaults(run=run)
        return sub

    train = command(
        "train", _train, "train on this machine, or go on where an earlier start of the run ended"
    )
    _add_recipe(train)
    train.add_argument(
        "--run-dir", metavar="DIR", help="folder to make or go on with (default: runs/RECIPE)"
    )
    _add_nproc(train)
    train.add_argument(
        "--fresh", action="store_true", help="start anew; a run that is there is renamed"
    )
    add_allow_changed(train)
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe and the command; make and start nothing",
    )
    resume = command("resume", _resume, "go on with a run, from its own recipe")
    resume.add_argument("run_dir", metavar="RUN_DIR", help="folder that train made")
    _add_overrides(resume, "such as parallel.strategy=ddp")
    _add_nproc(resume)
    add_allow_changed(resume)
    resume.add_argument("--nodes", type=_count, metavar="N", help="nodes of the Slurm job")
    resume.add_argument("--time", metavar="HH:MM:SS", help="time limit of the Slurm job")
    resume.add_argument("--cluster", metavar="FILE", help="submit it to this cluster")
    resume.add_argument(
        "--here", action="store_true", help="on this machine, although it was submitted to Slurm"
    )
    validate.add_command(command, _add_recipe, count=_count)
    schema = command("schema", _schema, "print the JSON Schema of a recipe, for editors")
    schema.add_argument("--cluster", action="store_true", help="of a cluster file instead")
    evaluate = command("evaluate", _evaluate, "score the adapter of a finished run")
    evaluate.add_argument("run_dir", metavar="RUN_DIR", help="folder that train made")
    _add_overrides(evaluate, "such as data.eval=other.jsonl")
    _add_nproc(evaluate)
    quantize = command(
        "quantize", _quantize, "fill the cache of packed bases ahead of a run", own_help=False
    )
    quantize.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub id")
    merge = command("merge", _merge, "merge a run's LoRA into its base, as a plain model")
    merge.add_argument("run_dir", metavar="RUN_DIR", help="folder that train made")
    merge.add_argument("--out", metavar="DIR", required=True, help="folder to make")
    goodput = command("goodput", _goodput, "show where the time of a run went")
    goodput.add_argument("run_dir", metavar="RUN_DIR", help="folder that train made")
    goodput.add_argument("--json", action="store_true", help="print every figure as JSON")
    report = command("report", _report, "make one HTML page about a run, or about several")
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folder that train made")
    report.add_argument(
        "--out",
        metavar="FILE",
        help="file to write (default: RUN_DIR/report.html; of several runs: ./report.html)",
    )
    report.add_argument(
        "--open", choices=("yes", "no"), default="no", help="show it in a browser (default: no)"
    )
    slurm.add_commands(command, count=_count)
    submit_command.add_commands(command, count=_count)
    wandb.add_commands(command)
    plan.add_commands(command)
    init = command("init", _init, "copy recipes and strategies into a folder of your own")
    init.add_argument("folder", metavar="DIR", help="folder to copy into; nothing is overwritten")
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file (YAML)")
    _add_overrides(parser, "such as train.learning_rate=5e-4")


def _add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help=f"settings that replace the recipe's, {example}",
    )


def _add_nproc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc", type=_count, metavar="N", help="processes; overrides parallel.processes"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:9]) < 10**6:
        raise argparse.ArgumentTypeError(f"got {text!r}; must be a whole number above 0")
    return int(text)


def _train(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.run_dir or Path("runs") / Path(arguments.recipe).stem)
    return _start(arguments, folder, dry_run=arguments.dry_run, fresh=arguments.fresh)


def _resume(arguments: argparse.Namespace) -> int:
    from peft_dist.launch.here import refuse_changes_of_finished
    from peft_dist.run.directory import RunDir
    from peft_dist.slurm.resubmit import was_submitted

    if not arguments.here and (arguments.cluster or was_submitted(Path(arguments.run_dir))):
        return slurm.resume_job(arguments)
    run = RunDir.open(arguments.run_dir)
    if run.is_finished:
        refuse_changes_of_finished(run, arguments.overrides)
        show(f"{arguments.run_dir} has finished; nothing is left to do")
        return EXIT_DONE
    arguments.recipe = str(run.recipe)
    return _start(arguments, run.path)


def _start(
    arguments: argparse.Namespace, folder: Path, *, dry_run: bool = False, fresh: bool = False
) -> int:
    """Train a recipe in a run directory, from wherever that has come to."""
    from peft_dist.common.sharing import set_run_umask, share_like
    from peft_dist.config import load_recipe, render_recipe
    from peft_dist.launch.command import shell_line
    from peft_dist.launch.here import prepare, train_here
    from peft_dist.launch.packages import require_training_packages
    from peft_dist.plan.settle import settle_here

    processes = [] if arguments.nproc is None else [f"parallel.processes={arguments.nproc}"]
    recipe = load_recipe(arguments.recipe, [*arguments.overrides, *processes])
    settled = settle_here(recipe)
    start = prepare(
        settled.recipe,
        folder,
        allow_changed=arguments.allow_changed,
        prediction=settled.prediction(),
    )
    if dry_run:
        command = shell_line(start.command, start.environment)
        show(f"{render_recipe(settled.recipe)}\n{command}")
        return EXIT_DONE
    require_training_packages(start.strategy)
    share_like(folder)
    set_run_umask()
    return train_here(start, fresh=fresh)


def _schema(arguments: argparse.Namespace) -> int:
    from peft_dist.config.cluster import cluster_schema
    from peft_dist.config.load import recipe_schema

    show(cluster_schema() if arguments.cluster else recipe_schema())
    return EXIT_DONE


def _evaluate(arguments: argparse.Namespace) -> int:
    from peft_dist.config import load_recipe
    from peft_dist.launch.command import launch_environment, worker_command
    from peft_dist.launch.here import run_here
    from peft_dist.launch.packages import require_training_packages
    from peft_dist.launch.placement import plan_processes, this_machine
    from peft_dist.run.directory import RunDir

    run = RunDir.open(arguments.run_dir)
    processes = [] if arguments.nproc is None else [f"parallel.processes={arguments.nproc}"]
    recipe = load_recipe(run.recipe, [*arguments.overrides, *processes])
    placement = plan_processes(recipe, this_machine())
    require_training_packages(placement.strategy)
    command = worker_command(placement, "score.py", [str(run.path), *arguments.overrides])
    run.evaluation_log.unlink(missing_ok=True)
    environment = launch_environment(placement, os.environ)
    return run_here(command, environment, log=run.evaluation_log)


def _quantize(arguments: argparse.Namespace) -> int:
    from peft_dist.launch.command import quantize_command, worker_environment
    from peft_dist.launch.local import run_tool
    from peft_dist.launch.packages import require_training_packages

    require_training_packages()
    return run_tool(quantize_command(arguments.passed_on), environment=worker_environment())


def _merge(arguments: argparse.Namespace) -> int:
    from peft_dist.launch.command import merge_command, worker_environment
    from peft_dist.launch.local import run_tool
    from peft_dist.launch.packages import require_training_packages
    from peft_dist.run.directory import RunDir

    run = RunDir.open(arguments.run_dir)
    require_training_packages()
    command = merge_command(run.path, Path(arguments.out).absolute())
    return run_tool(command, environment=worker_environment())


def _goodput(arguments: argparse.Namespace) -> int:
    from peft_dist.ledger.goodput import goodput, render
    from peft_dist.ledger.reader import LedgerReader
    from peft_dist.run.directory import RunDir

    found = goodput(LedgerReader(RunDir.open(arguments.run_dir).ledger).all())
    show(found.to_json() if arguments.json else render(found))
    return EXIT_DONE


def _report(arguments: argparse.Namespace) -> int:
    from peft_dist.report.command import write_report

    return write_report(arguments.run_dirs, out=arguments.out, show=arguments.open == "yes")


def _init(arguments: argparse.Namespace) -> int:
    from peft_dist.common.paths import SHARED_FOLDERS, root

    target = Path(arguments.folder)
    sources = [root() / name for name in SHARED_FOLDERS if (root() / name).is_dir()]
    files = [
        file
        for source in sources
        for file in sorted(source.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    ]
    copies = {file: target / file.relative_to(root()) for file in files}
    try:
        taken = [copy for copy in copies.values() if copy.exists() or copy.is_symlink()]
        if taken:
            raise PeftDistError("already there", where=str(taken[0]), remedy="choose a new folder")
        for file, copy in copies.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    except (OSError, ValueError) as error:
        raise PeftDistError(
            f"cannot be written: {error}", where=str(target), remedy="choose another folder"
        ) from error
    show(f"{len(copies)} files in {', '.join(str(target / source.name) for source in sources)}")
    return EXIT_DONE


def _complain(line: str, code: int) -> int:
    show(f"{ERROR_PREFIX}{line}", sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
