"""Fill in a template of a shell script: nothing gets into it but through a filter.

A filter quotes its value or refuses it; the set-up lines of a cluster file alone are meant as shell
text. Knows nothing of jobs.
"""

import functools
import re
import shlex
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from peft_dist.common import paths
from peft_dist.common.errors import ClusterError

FILLED_IN = re.compile(
    r"\$(SLURM_(?:NODEID|PROCID)|PEFT_DIST_HEAD|PEFT_DIST_PORT|rendezvous|inside|interpreter|share/[a-z0-9_./]+)"
)
"""Arguments that each node fills in; every other one is text."""


class _Safe(str):
    """Text that has passed a filter."""

    __slots__ = ()


def fill(template: str, **values: Any) -> str:
    """Return a script.

    Args:
        template: Its file in `slurm/templates/`.
        values: What its expressions name.

    Raises:
        ClusterError: For a value that no script can hold safely.
    """
    return _templates().get_template(template).render(**values)


@functools.cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(paths.root() / "slurm" / "templates"),
        undefined=StrictUndefined,
        autoescape=False,  # no HTML; `_only_safe` sees that everything is quoted for the shell
        finalize=_only_safe,
        trim_blocks=True,
        lstrip_blocks=True,
        comment_start_string="<#",  # for {# is bash's
        comment_end_string="#>",
        keep_trailing_newline=True,
    )
    environment.filters.update(
        command=_command,
        comment=lambda text: _Safe(_printable(text)),
        directive=_directive,
        lines=lambda text: _Safe(text.strip("\n")),
        node_path=_node_path,
        number=lambda number: _Safe(int(number)),
        sh=_shell,
        word=_word,
    )
    return environment


def _only_safe(value: Any) -> Any:
    # What stands in a template itself comes as plain text too, and is no output of an expression.
    assert isinstance(value, _Safe), f"{value!r} is put into a script unquoted"
    return value


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ClusterError(
            f"{text[:200]!r} holds a character that cannot be printed",
            where="job script",
            remedy="choose a name without it",
        )
    return text


def _shell(text: str) -> _Safe:
    return _Safe(shlex.quote(_printable(text)))


def _command(words: Sequence[str]) -> _Safe:
    """Quote an argv, a line for each option."""
    quoted = [f'"{word}"' if FILLED_IN.fullmatch(word) else _shell(word) for word in words]
    starts_line = [word.startswith("--") or word.endswith(".py") for word in words]
    return _Safe(
        "".join(
            (" \\\n  " if starts else " ") + text
            for text, starts in zip(quoted, starts_line, strict=True)
        ).lstrip()
    )


def _node_path(text: str) -> _Safe:
    """Quote a path whose beginning is a variable of the node."""
    variable, slash, rest = text.partition("/")
    return _Safe(f'"{variable}"{_shell(slash + rest)}')


def _word(text: str) -> _Safe:
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", text), text
    return _Safe(text)


def _directive(text: str) -> _Safe:
    """Quote a value as sbatch reads it: double quotes, in which a backslash escapes."""
    if "\\" in _printable(text):  # Slurm takes one in a path as "expand no %"
        raise ClusterError(
            f"{text[:200]!r} holds a backslash",
            where="job script",
            remedy="choose a name without it",
        )
    if re.fullmatch(r"[A-Za-z0-9_.,:@%/+=-]+", text):
        return _Safe(text)
    return _Safe('"' + text.replace('"', '\\"') + '"')
