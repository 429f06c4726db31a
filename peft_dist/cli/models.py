"""`peft-dist models`: which models can be trained; without torch, unless it is to try them."""

import argparse
from collections.abc import Callable, Sequence

from peft_dist.common.console import show
from peft_dist.common.errors import EXIT_DONE, PeftDistError

Run = Callable[[argparse.Namespace], int]

COLUMNS_OF_A_FILE = 96
"""How wide the list is where standard output is no terminal."""


def add_commands(command: Callable[[str, Run, str], argparse.ArgumentParser]) -> None:
    """Add the command; see `cli.wandb.add_commands`."""
    models = command("models", _models, "list the models that can be trained")
    models.add_argument("types", nargs="*", metavar="TYPE", help="with --check: only these")
    models.add_argument(
        "--check",
        action="store_true",
        help="build each one tiny, and compare its training with transformers; takes minutes",
    )
    models.add_argument("--classify", action="store_true", help="classifiers in place of decoders")
    models.add_argument("--nf4", action="store_true", help="with --check: with a base in 4 bits")


def _models(arguments: argparse.Namespace) -> int:
    from peft_dist.config.models import TESTED, TESTED_CLASSIFIERS, known_to_transformers

    known = known_to_transformers(classify=arguments.classify)
    unknown = [name for name in arguments.types if name not in known]
    if unknown:
        kind = "classifier" if arguments.classify else "decoder"
        raise PeftDistError(
            f"transformers has no {kind} {unknown[0]!r}", remedy="see `peft-dist models`"
        )
    if arguments.check:
        return _check(arguments)
    if arguments.types or arguments.nf4:
        raise PeftDistError("TYPE and --nf4 are for --check", remedy="add --check")
    tested = TESTED_CLASSIFIERS if arguments.classify else TESTED
    what = "logits" if arguments.classify else "losses"
    _show_table(tested, [name for name in known if name not in tested], what)
    if not known:
        show("transformers, whose other decoders are proven at start, is not installed here")
    return EXIT_DONE


def _show_table(tested: Sequence[str], proven: Sequence[str], what: str) -> None:
    from peft_dist.common.table import Column, print_lines, stdout_form, table_lines

    columns = [
        Column("", style=lambda _: "cyan"),
        Column("", wrap=True),
    ]
    rows = [["tested", ", ".join(tested)]]
    if proven:
        rows.append(["proven at start", ", ".join(proven)])
    width, colour = stdout_form()
    lines = table_lines(columns, rows, width=width or COLUMNS_OF_A_FILE, colour=colour)
    print_lines(
        [
            *lines,
            "",
            "tested: trained by the tests, on every engine",
            f"proven at start: trained where the {what} are those of transformers, else refused",
        ]
    )


def _check(arguments: argparse.Namespace) -> int:
    from peft_dist.launch.command import check_models_command, worker_environment
    from peft_dist.launch.launcher_process import run_tool
    from peft_dist.launch.packages import require_training_packages

    require_training_packages()
    options = [*arguments.types]
    options += [f"--{name}" for name in ("nf4", "classify") if getattr(arguments, name)]
    return run_tool(check_models_command(options), environment=worker_environment())
