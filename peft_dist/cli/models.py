"""`peft-dist models`: which models can be trained; without torch, unless it is to try them."""

import argparse
import textwrap
from collections.abc import Callable

from peft_dist.common.console import show
from peft_dist.common.errors import EXIT_DONE, PeftDistError

Run = Callable[[argparse.Namespace], int]


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
    show("tested: trained by the tests, on every engine")
    _show_names(tested)
    what = "logits" if arguments.classify else "losses"
    show(f"proven at start: trained where the {what} are those of transformers, else refused")
    _show_names([name for name in known if name not in tested])
    if not known:
        show("  those of transformers, which is not installed here")
    return EXIT_DONE


def _show_names(names: tuple[str, ...] | list[str]) -> None:
    for line in textwrap.wrap(", ".join(names), 96, break_on_hyphens=False):
        show(f"  {line}")


def _check(arguments: argparse.Namespace) -> int:
    from peft_dist.launch.command import check_models_command, worker_environment
    from peft_dist.launch.local import run_tool
    from peft_dist.launch.packages import require_training_packages

    require_training_packages()
    options = [*arguments.types]
    options += [f"--{name}" for name in ("nf4", "classify") if getattr(arguments, name)]
    return run_tool(check_models_command(options), environment=worker_environment())
