"""The `peft-dist` command: read arguments, call one function, map faults to exit codes.

Imports are inside the commands, so that `--help` starts at once. Trains nothing itself: torch is
only ever imported by the processes it starts.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from peft_dist.cli import (
    make_model,
    models,
    plan,
    recipes,
    slurm,
    submit_command,
    training,
    validate,
    wandb,
)
from peft_dist.cli.options import (
    SHELLS,
    add_verbosity,
    begin_logs,
    completion,
    remedy_for_option,
)
from peft_dist.common.arguments import add_allow_changed
from peft_dist.common.console import show
from peft_dist.common.errors import (
    ERROR_PREFIX,
    EXIT_CRASHED,
    EXIT_DONE,
    PeftDistError,
    nearest,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        arguments = _parse(list(sys.argv[1:] if argv is None else argv))
        begin_logs(arguments)
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

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse what is no choice, with the nearest one."""
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(
                action, f"there is no {value!r}; {nearest(str(value), action.choices)}"
            )

    def error(self, message: str) -> NoReturn:
        if self.prog.endswith((" train", " validate", " submit")):  # key=value may be left out
            message = message.replace(", key=value", "")
        raise PeftDistError(message, remedy=f"see {self.prog} --help")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = build_parser()
    argv = submit_command.join_words(argv)
    arguments, rest = parser.parse_known_args(["--help"] if argv == ["help"] else argv)
    # argparse stops collecting key=value at the first option; those after it end up here.
    stray = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if stray:
        raise PeftDistError(
            f"unrecognized argument {stray[0]!r}",
            remedy=remedy_for_option(stray[0], arguments.parser),
        )
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
        name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run, parser=sub)
        return sub

    train = command(
        "train",
        training.train,
        "train on this machine, or go on where an earlier start of the run ended",
    )
    _add_recipe(train)
    train.add_argument(
        "--run-dir", metavar="DIR", help="folder to make or go on with (default: runs/RECIPE)"
    )
    _add_nproc(train)
    train.add_argument(
        "--array",
        action="append",
        default=[],
        metavar="KEY=V1,V2,...",
        help="train one run per value, one after the other; given again, of all combinations; or "
        "a YAML file of lists",
    )
    train.add_argument(
        "--fresh", action="store_true", help="start anew; a run that is there is renamed"
    )
    add_allow_changed(train)
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe and the command; make and start nothing",
    )
    train.add_argument("--json", action="store_true", help="print what --dry-run shows as JSON")
    add_verbosity(train)
    resume = command("resume", training.resume, "go on with a run, from its own recipe")
    resume.add_argument("run_dir", metavar="RUN_DIR", help="folder that train made")
    _add_overrides(resume, "such as parallel.strategy=ddp")
    _add_nproc(resume)
    add_allow_changed(resume)
    resume.add_argument(
        "--more-epochs",
        type=_count,
        metavar="N",
        help="train a finished run's adapter for N epochs more, as a run RUN_DIR-plus-N-epochs",
    )
    resume.add_argument("--nodes", type=_count, metavar="N", help="nodes of the Slurm job")
    resume.add_argument("--time", metavar="HH:MM:SS", help="time limit of the Slurm job")
    resume.add_argument("--cluster", metavar="FILE", help="submit it to this cluster")
    resume.add_argument(
        "--here", action="store_true", help="on this machine, although it was submitted to Slurm"
    )
    add_verbosity(resume)
    validate.add_command(command, _add_recipe, count=_count)
    schema = command("schema", _schema, "print the JSON Schema of a recipe, for editors")
    schema.add_argument("--cluster", action="store_true", help="of a cluster file instead")
    evaluate = command("evaluate", training.evaluate, "score the adapter of a finished run")
    evaluate.add_argument("run_dir", metavar="RUN_DIR", help="folder that train made")
    _add_overrides(evaluate, "such as data.eval=other.jsonl")
    _add_nproc(evaluate)
    add_verbosity(evaluate)
    make_model.add_commands(command)
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
    models.add_commands(command)
    recipes.add_commands(command)
    complete = command(
        "completion", _completion, "print a script that completes commands: source it in your shell"
    )
    complete.add_argument("shell", choices=SHELLS, help="which shell")
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


def _schema(arguments: argparse.Namespace) -> int:
    from peft_dist.config.cluster import cluster_schema
    from peft_dist.config.load import recipe_schema

    show(cluster_schema() if arguments.cluster else recipe_schema())
    return EXIT_DONE


def _goodput(arguments: argparse.Namespace) -> int:
    from peft_dist.common.table import print_lines, stdout_form
    from peft_dist.ledger.goodput import goodput
    from peft_dist.ledger.goodput_table import render
    from peft_dist.ledger.reader import LedgerReader
    from peft_dist.run.directory import RunDir

    found = goodput(LedgerReader(RunDir.open(arguments.run_dir).ledger).all())
    if arguments.json:
        show(found.to_json())
    else:
        width, colour = stdout_form()
        print_lines(render(found, width=width, colour=colour))
    return EXIT_DONE


def _report(arguments: argparse.Namespace) -> int:
    from peft_dist.report.command import write_report

    return write_report(arguments.run_dirs, out=arguments.out, show=arguments.open == "yes")


def _completion(arguments: argparse.Namespace) -> int:
    show(completion(build_parser(), arguments.shell), end="")
    return EXIT_DONE


def _complain(line: str, code: int) -> int:
    show(f"{ERROR_PREFIX}{line}", sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
