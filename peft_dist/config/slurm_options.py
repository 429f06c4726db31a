"""Options of sbatch and srun that a cluster file hands on as they stand, and those it may not.

A script relies on what it asks for itself: those options, and abbreviations of them, are refused.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import AfterValidator, StrictBool, StrictInt

from peft_dist.config.cluster_values import PASSWORD_IN_ADDRESS, check_printable
from peft_dist.config.section import Matches

FIELDS = {
    "partition": "partition", "account": "account", "qos": "qos", "reservation": "reservation",
    "constraint": "constraint", "gres": "gres", "mem": "memory_per_node",
    "cpus-per-task": "cpus_per_node", "time": "max_time",
}  # fmt: skip
"""Options of sbatch that a key of the cluster file says, which other checks read."""
PLAIN_FIELDS = ("partition", "account", "qos", "reservation", "constraint")
"""Those of them whose key takes what the option takes."""
_OF_BOTH = (
    "array", "chdir", "dependency", "error", "export", "export-file", "help", "input", "job-name",
    "nodes", "no-kill", "ntasks", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-node",
    "ntasks-per-socket", "ntasks-per-tres", "open-mode", "output", "requeue", "signal", "test-only",
    "usage", "version",
)  # fmt: skip
OF_SBATCH = frozenset(
    (*_OF_BOTH, "comment", "get-user-env", "no-requeue", "parsable", "wait", "wait-all-nodes",
     "wrap")
)  # fmt: skip
"""Options that the batch script, or whoever submits it, gives itself."""
OF_SRUN = frozenset(
    (*_OF_BOTH, "immediate", "jobid", "kill-on-bad-exit", "multi-prog", "nodelist", "overlap",
     "pty", "relative", "wait")
)  # fmt: skip
"""Options of the step on all nodes, and of the one that decides after it."""


def _check_value(value: str | int | bool) -> str | int | bool:
    if value is False or value == "":
        raise ValueError(f"got {value!r}; must be a value, or true for an option that takes none")
    if isinstance(value, str):
        check_printable(value)
        if "\\" in value:
            raise ValueError(f"got {value[:80]!r}; must be without a backslash")
        if PASSWORD_IN_ADDRESS.search(value):
            raise ValueError("holds a password, and would stand in a script; remove it")
    return value


def _check(options: Mapping[str, object], protected: frozenset[str]) -> None:
    for name in options:
        # getopt takes `--nod` for `--nodes`.
        means = sorted(own for own in protected if own.startswith(name))
        if means:
            raise ValueError(f"{name} is set by peft-dist itself ({means[0]}); remove it")


def _check_sbatch(options: Mapping[str, object]) -> Mapping[str, object]:
    _check(options, OF_SBATCH)
    for name, value in options.items():
        field = next((key for option, key in FIELDS.items() if option.startswith(name)), None)
        if field is not None:
            raise ValueError(f"{name} has a key of its own; write {field}: instead")
        if "exclusive".startswith(name) and value is True:
            raise ValueError(f"{name} has a key of its own; write exclusive: true instead")
    return options


def _check_srun(options: Mapping[str, object]) -> Mapping[str, object]:
    _check(options, OF_SRUN)
    return options


_Name = Annotated[
    str, Matches(r"[a-z][a-z0-9_-]{1,63}", "an option's long name without --, such as mail-type")
]
_Value = Annotated[str | StrictInt | StrictBool, AfterValidator(_check_value)]
SbatchOptions = Annotated[dict[_Name, _Value], AfterValidator(_check_sbatch)]
SrunOptions = Annotated[dict[_Name, _Value], AfterValidator(_check_srun)]


def option_words(options: Mapping[str, str | int | bool]) -> list[tuple[str, str | None]]:
    """Return options with their values as text; None for those that take none."""
    return [(name, None if value is True else str(value)) for name, value in options.items()]


def parse_option(text: str) -> tuple[str, str | bool]:
    """Return name and value of `NAME=VALUE`, or of a `NAME` that takes no value.

    A leading `--` is left out. Checks nothing: a cluster file's rules do.
    """
    name, equals, value = text.removeprefix("--").partition("=")
    return name, value if equals else True


def with_options(values: Mapping[str, object], options: Sequence[str]) -> dict[str, object]:
    """Return the values of a cluster file with options of sbatch from a command line.

    What has a key of its own there replaces that.

    Args:
        values: As the file has them.
        options: Each `NAME=VALUE` or `NAME`.
    """
    given = dict(parse_option(text) for text in options)
    keys = {name: value for name, value in given.items() if name in PLAIN_FIELDS}
    old = values.get("sbatch")
    rest = {name: value for name, value in given.items() if name not in PLAIN_FIELDS}
    if not rest:
        return {**values, **keys}
    return {**values, **keys, "sbatch": {**(old if isinstance(old, Mapping) else {}), **rest}}


def static_exclude(options: Mapping[str, str | int | bool]) -> str:
    """Return the nodes that the cluster file excludes, as Slurm writes a list of them."""
    text = str(options.get("exclude", ""))
    return text if re.fullmatch(r"[A-Za-z0-9_.,\[\]-]*", text) else ""
